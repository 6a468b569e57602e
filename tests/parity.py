"""Reference numbers of the published models, and the weights they belong to.

``tests/data/parity/<case>.json`` says what was run, ``<case>.npz`` holds the
numbers. No weights are stored: each is generated from its published name and
shape by :func:`make_weight`, and the sums in the json reveal a generator that
has changed. See ``tests/data/parity/README.md``.
"""

import json
import math
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / 'data' / 'parity'
RTOL = 2e-4
_OPTIONAL = ('debug/', 'pre_logits', 'grad')


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _step(name: str, shape: tuple, largest: float) -> np.ndarray:
    low, high = math.log(1e-3), math.log(largest)
    return np.exp(low + (high - low) * _generator(name).random(shape))


def _inverse_softplus(x: np.ndarray) -> np.ndarray:
    return x + np.log(-np.expm1(-x))


def make_weight(name: str, shape: tuple) -> np.ndarray:
    """Weight (float32) of a published name; the first rule that fits wins."""
    leaf = name.rpartition('.')[2]
    if leaf == 'dt_projs_bias' or name.endswith(('dt_proj.bias', 'dt_proj_b.bias')):
        return _inverse_softplus(_step(name, shape, 0.1)).astype(np.float32)
    n = _generator(name).standard_normal(shape)
    if leaf in ('pos_embed', 'pos_embed_cls', 'cls_token', 'absolute_pos_embed'):
        value = 0.02 * n
    elif leaf in ('A_log', 'A_b_log', 'A_logs'):
        value = np.log(np.arange(1.0, shape[-1] + 1)) + 0.05 * n
    elif leaf in ('D', 'D_b', 'Ds') or leaf == 'weight' and len(shape) == 1:
        value = 1 + 0.1 * n
    elif leaf in ('running_mean', 'bias'):
        value = 0.1 * n
    elif leaf == 'running_var':
        value = np.exp(0.1 * n)
    elif leaf in ('x_proj_weight', 'dt_projs_weight'):
        value = n / math.sqrt(shape[-1])
    else:
        value = n / math.sqrt(math.prod(shape[1:]))
        if name.endswith(('cpe1.weight', 'cpe2.weight')):
            value = 0.2 * value
    return value.astype(np.float32)


@lru_cache(maxsize=1)
def _make_weights(shapes: str) -> dict[str, np.ndarray]:
    return {name: make_weight(name, tuple(shape)) for name, shape in json.loads(shapes)}


def make_input(
    key: str, shape: tuple, rule: str = 'normal', scale: float = 1.0
) -> np.ndarray:
    """Input (float32) of an operator, a layer or a model."""
    if rule == 'step':
        value = _step(key, shape, scale)
    elif rule == 'inv_step':
        value = _inverse_softplus(_step(key, shape, scale))
    else:
        n = _generator(key).standard_normal(shape)
        value = {
            'normal': lambda: scale * n,
            'neg_exp': lambda: -np.exp(scale * n),
            's4d': lambda: -np.arange(1.0, shape[-1] + 1) * np.exp(0.05 * n),
            'ones': lambda: 1 + scale * n,
        }[rule]()
    return value.astype(np.float32)


def list_cases(pattern: str = '*') -> list[str]:
    """Names of the cases that match a shell pattern."""
    return sorted(path.stem for path in DATA.glob(pattern + '.json'))


class Case:
    """One published result.

    Attributes:
        name: Name of the case.
        meta: Content of the json.
        arguments: Constructor or function arguments of the published code.
    """

    def __init__(self, name: str):
        self.name = name
        self.meta = json.loads((DATA / f'{name}.json').read_text())
        self.arguments = self.meta['arguments']
        with np.load(DATA / f'{name}.npz') as data:
            self._numbers = dict(data)

    def weights(self) -> dict[str, torch.Tensor]:
        """Published name -> weight (float32)."""
        # Tests of one case on several backends follow each other.
        made = _make_weights(json.dumps(self.meta['state_dict']))
        weights = {name: value.copy() for name, value in made.items()}
        digest = self.meta['weights_digest']
        total = sum(w.sum(dtype=np.float64) for w in weights.values())
        absolute = sum(np.abs(w).sum(dtype=np.float64) for w in weights.values())
        tolerance = 1e-6 * digest['abs_sum']
        assert (
            abs(total - digest['sum']) <= tolerance
            and abs(absolute - digest['abs_sum']) <= tolerance
        ), f'{self.name}: these are not the weights of the published run'
        return {name: torch.from_numpy(w) for name, w in weights.items()}

    def inputs(self) -> dict[str, torch.Tensor]:
        """Argument -> input (float32); ``input`` of a model."""
        if 'input' in self.meta:
            spec = self.meta['input']
            value = make_input(spec['name'], tuple(spec['shape']))
            return {'input': torch.from_numpy(value)}
        return {
            spec['arg']: torch.from_numpy(
                make_input(
                    spec['key'],
                    tuple(spec['shape']),
                    spec['rule'],
                    spec.get('scale', 1.0),
                )
            )
            for spec in self.meta['op_inputs']
        }

    def check(self, outputs: dict[str, torch.Tensor], rtol: float = RTOL) -> None:
        """Compare with the published numbers.

        Samples, mean and standard deviation may differ by ``rtol`` of the
        published standard deviation, the L2 norm by ``rtol`` of itself.
        Intermediate values and gradients may be left out.
        """
        specs = self.meta['outputs']
        required = {n for n in specs if not n.startswith(_OPTIONAL)}
        assert required <= set(outputs) <= set(specs), (
            f'{self.name} has the outputs {list(specs)}, got {list(outputs)}'
        )
        for name, value in outputs.items():
            self._check(name, value, specs[name], rtol)

    def _check(self, name: str, value: torch.Tensor, spec: dict, rtol: float) -> None:
        where = f'{self.name}/{name}'
        want = self._numbers[name]
        got = value.detach().cpu().numpy()
        assert got.shape == tuple(spec['shape']), (where, got.shape)
        if spec.get('exact'):
            assert (got == want).all(), where
            return
        got = got.astype(np.float64)
        scale = spec['std'] or 1.0
        sample = got.reshape(-1)[:: spec['stride']]
        errors = dict(
            sample=np.abs(sample - want.reshape(-1)).max() / scale,
            mean=abs(got.mean() - spec['mean']) / scale,
            std=abs(got.std() - spec['std']) / scale,
            l2=abs(np.sqrt((got**2).sum()) - spec['l2']) / (spec['l2'] or 1.0),
        )
        # A NaN is not within the tolerance either.
        wrong = {key: e for key, e in errors.items() if not e <= rtol}
        assert not wrong, f'{where} exceeds rtol {rtol}: {wrong}'
