"""The short table at the end of ``gpu_suite.py``."""

from collections import defaultdict

# How the names of rows of ``gpu_op`` end that have the compiled plain scan alone.
COMPILED = ', compiled torch'

# Times of ours are compared with these.
_OURS = ('cuda', 'cpu', 'torch', 'ours')
# The keys of a case of a model that say who is measured.
_WHO = ('model', 'rival')
_SWINS = ('swin_t, fused', 'swin_t, mmseg')


def table(parts: dict[str, dict]) -> str:
    """All parts, a line a row; what failed and what was left out at the end."""
    lines, notes = [], []
    hardware = next(
        (found['runs'][-1]['hardware'] for found in parts.values() if 'runs' in found),
        None,
    )
    if hardware:
        products, convolutions = (
            'on' if hardware[f'tf32_{name}'] else 'off'
            for name in ('matmul', 'convolution')
        )
        lines.append(
            f'{hardware["device"]}, torch {hardware["torch"]}; TF32 in products '
            f'{products}, in convolutions {convolutions}'
        )
    if 'check' in parts:
        lines.append(f'check: {parts["check"]["verdict"]}')
    if 'tests' in parts:
        lines.append(_tests(parts['tests']))
    for part, make in (('op', _op), ('blocks', _blocks), ('models', _models)):
        if part in parts:
            found = parts[part]
            rows = [row for row in found['rows'] if 'failed' not in row]
            lines += ['', *make(rows)]
            notes += _notes(part, found)
    return '\n'.join([*lines, *([''] if notes else []), *notes])


def _tests(found: dict) -> str:
    text = ', '.join(
        f'{found[kind]} {kind}'
        for kind in ('passed', 'failed', 'error', 'skipped')
        if found.get(kind)
    )
    if found.get('why'):
        text = f'{text}; {found["why"]}'.strip('; ')
    return '\n  '.join([f'tests: {text or "none ran"}', *found['failures'][:8]])


def _median(times: dict | None) -> float | None:
    return (times or {}).get('median')


def _ms(seconds: float | None) -> str:
    return f'{"-":>9}' if seconds is None else f'{1e3 * seconds:9.3f}'


def _ratio(above: float | None, below: float | None) -> str:
    if not above or not below:
        return f'{"-":>7}'
    return f'{above / below:6.2f}x'


def ours_of(names: list[str], medians: dict[str, float | None]) -> str | None:
    """The fastest of our contenders, None if none was measured."""
    measured = [
        name
        for name in names
        if name.split()[0] in _OURS
        and not name.endswith('unfused')
        and medians.get(name)
    ]
    return min(measured, key=lambda name: medians[name], default=None)


def _op(rows: list[dict]) -> list[str]:
    """Ours at its fastest, and how many times as long the floor and others take."""
    lines = [
        f'{"selective_scan, ms":38}{"pass":>5}{"by":>8}{"ours":>9}{"/floor":>8}'
        f'{"mamba/":>8}{"oflex/":>8}{"torch/":>8}{"MiB":>7}{"error":>9}'
    ]
    compiled = {
        row['name'].removesuffix(COMPILED): row['contenders'].get('torch', {})
        for row in rows
        if row['name'].endswith(COMPILED)
    }
    for row in rows:
        if row['name'].endswith(COMPILED):
            continue
        for which, short in (('forward', 'f'), ('both', 'f+b')):
            found = row['contenders']
            medians = {who: _median(times.get(which)) for who, times in found.items()}
            ours = ours_of(list(found), medians)
            if ours is None:
                continue
            time = medians[ours]
            plain = compiled.get(row['name'], {}).get(which)
            medians['compiled'] = _median(plain)
            others = ''.join(
                f' {_ratio(medians.get(who), time)}'
                for who in ('mamba_ssm', 'oflex', 'compiled')
            )
            error = found[ours]['error']
            error = error['output' if which == 'forward' else 'gradients']
            lines.append(
                f'{row["name"]:38}{short:>5}{ours:>8}{_ms(time)}'
                f' {_ratio(time, row["floor"][which])}{others}'
                f'{_mib(found[ours][which])}{error:9.1e}'
            )
    return lines


def _mib(times: dict) -> str:
    peak = times.get('peak')
    return f'{"-":>7}' if peak is None else f'{peak / 2**20:7.0f}'


def sums(rows: list[dict]) -> list[dict]:
    """Rows of blocks, the stages of a network added up, times their depth.

    A contender that failed at a stage is left out of the sum.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row['name'].partition(':')[0]].append(row)
    found = []
    for name, members in groups.items():
        depths = [row['shape'].get('depth', 1) for row in members]
        entry = dict(name=name, stages=len(members), floor={}, contenders={})
        for which in ('forward', 'both'):
            entry['floor'][which] = sum(
                depth * row['floor'][which] for depth, row in zip(depths, members)
            )
            for who in members[0]['contenders']:
                times = [row['contenders'].get(who, {}).get(which) for row in members]
                if all(_median(taken) for taken in times):
                    entry['contenders'].setdefault(who, {})[which] = dict(
                        median=sum(d * t['median'] for d, t in zip(depths, times)),
                        peak=_most([t['peak'] for t in times]),
                    )
        found.append(entry)
    return found


def _most(values: list) -> float | None:
    return None if None in values else max(values)


def _blocks(rows: list[dict]) -> list[str]:
    lines = [
        f'{"cores of all blocks, ms":38}{"pass":>5}{"by":>14}{"ours":>9}{"/floor":>8}'
        f'{"unfused/":>9}{"published/":>11}{"MiB":>7}{"publ.":>7}'
    ]
    for entry in sums(rows):
        name = entry['name']
        if 'depth' in rows[0]['shape'] and entry['stages'] not in (1, 4):
            name += f' ({entry["stages"]} stages)'
        for which, short in (('forward', 'f'), ('both', 'f+b')):
            found = {w: t[which] for w, t in entry['contenders'].items() if which in t}
            medians = {who: times['median'] for who, times in found.items()}
            ours = ours_of(list(medians), medians)
            if ours is None:
                continue
            unfused = medians.get(f'{ours.split()[0]} unfused')
            published = next((w for w in found if w.startswith('published')), None)
            lines.append(
                f'{name:38}{short:>5}{ours:>14}{_ms(medians[ours])}'
                f' {_ratio(medians[ours], entry["floor"][which])}'
                f'  {_ratio(unfused, medians[ours])}'
                f'    {_ratio(medians.get(published), medians[ours])}'
                f'{_mib(found[ours])}{_mib(found.get(published, {}))}'
            )
    return lines


def _images(row: dict) -> tuple:
    """What is the same of all models: the images, the dtype, and the way."""
    return tuple(value for key, value in row['case'].items() if key not in _WHO)


def _models(rows: list[dict]) -> list[str]:
    """Images a second of ours, and ours over the others.

    Swin-T was measured in another row, on the same images.
    """
    lines = [
        f'{"models, images/s":42}{"pass":>10}{"by":>8}{"ours":>9}'
        f'{"/mamba":>8}{"/fused":>8}{"/unfused":>9}{"/swin_t":>9}{"MiB":>8}{"/swin_t":>9}'
    ]
    swins = {
        _images(row): times
        for row in rows
        for who, times in row['contenders'].items()
        if who in _SWINS
    }
    for row in rows:
        for which in ('inference', 'training'):
            found = row['contenders']
            medians = {who: _median(times.get(which)) for who, times in found.items()}
            ours = ours_of(list(found), medians)
            if ours is None:
                continue
            time, swin = medians[ours], swins.get(_images(row), {}).get(which)
            peak = found[ours][which].get('peak')
            rivals = {
                how: next(
                    (medians[who] for who in found if who.endswith(f', {how}')), None
                )
                for how in ('fused', 'unfused', 'mmseg')
            }
            lines.append(
                f'{row["name"]:42}{which:>10}{ours:>8}'
                f'{row["case"]["batch"] / time:9.1f}'
                f' {_ratio(medians.get("mamba_ssm"), time)}'
                f' {_ratio(rivals["fused"] or rivals["mmseg"], time)}'
                f'  {_ratio(rivals["unfused"], time)}  {_ratio(_median(swin), time)}'
                f' {_mib(found[ours][which])}  {_ratio(peak, (swin or {}).get("peak"))}'
            )
    return lines


def _notes(part: str, found: dict) -> list[str]:
    """What failed or was left out, each reason once."""
    reasons = defaultdict(list)
    for row in found['rows']:
        if 'failed' in row:
            reasons[row['failed']].append(row['name'])
        for who, why in row.get('left_out', {}).items():
            reasons[f'{who} left out: {why}'].append(row['name'])
        for who, times in row.get('contenders', {}).items():
            for which, taken in times.items():
                if isinstance(taken, dict) and 'failed' in taken:
                    reasons[f'{who}, {which}: {taken["failed"]}'].append(row['name'])
    total = len(found['rows'])
    lines = [
        f'{part}: {why[:150]}'
        + ('' if len(names) == total else f' ({len(names)} of {total} rows)')
        for why, names in reasons.items()
    ]
    if found.get('left_out'):
        names = found['left_out']
        lines.append(
            f'{part}: out of time before {len(names)} rows, from "{names[0]}" on; '
            f'--part {part} goes on there'
        )
    return lines
