"""The names under which results of several machines lie side by side."""

import pytest


@pytest.mark.parametrize(
    ('cpu', 'model', 'name'),
    [
        (
            'AMD EPYC, 2 cores usable',
            'AuthenticAMD, family 25, model 17, stepping 1',
            'amd-family-25-model-17-stepping-1-avx2-2-cores',
        ),
        (
            'Intel(R) Xeon(R) CPU @ 2.50GHz, 16 cores usable',
            'GenuineIntel, family 6, model 85, stepping 7',
            'intel-family-6-model-85-stepping-7-avx2-16-cores',
        ),
        (
            'Neoverse-V1, r1p1, 4 cores usable',
            'unknown maker',
            'neoverse-v1-r1p1-avx2-4-cores',
        ),
    ],
)
def test_name_of_a_machine(load, monkeypatch, cpu, model, name):
    machines = load('machines')
    machine = {'CPU': cpu, 'CPU model': model}
    monkeypatch.setattr(machines, 'collect_env', lambda: dict(Machine=machine))
    monkeypatch.setattr(machines.library, 'unavailable', lambda: None)
    monkeypatch.setattr(machines.library, 'isa', lambda: 'avx2')
    assert machines.name() == name
    path = machines.results_file('some_benchmark')
    assert path.parts[-3:] == ('results', 'some_benchmark', f'{name}.json')
    monkeypatch.setattr(machines.library, 'unavailable', lambda: 'no compiler')
    assert 'no-kernels' in machines.name()


def test_facts_have_variables_of_the_libraries(load, monkeypatch):
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')
    facts = load('machines').facts()
    assert facts['variables']['OMP_WAIT_POLICY'] == 'PASSIVE'
    assert facts['environment']['Packages']['torch']
