"""What every test gets: a strict jax, Hypothesis profiles, and the meaning of the markers.

The markers are declared in pyproject.toml. Plain ``pytest`` runs all but ``full``; with
``-m "not slow"`` it is the quick suite; with ``--full`` everything, with more Hypothesis examples.
"""

import importlib.util

import hypothesis
import jax
import pytest

# Relax them for one test with `with jax.numpy_dtype_promotion("standard"):` and its like.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Meshes for the sharding tests, on any machine. Unsharded work stays on the first device.
jax.config.update("jax_num_cpu_devices", 8)

# A first call compiles, so a deadline would measure the compiler. The quick profile tries the same
# examples on every machine; the full one looks for new ones.
hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("full", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("quick")

ORACLES = ("torch", "transformers", "peft")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also tests marked full; more examples")
    parser.addoption(
        "--require-oracles",
        action="store_true",
        help="a skipped oracle test is a failure, and there must be one (CI, where torch is)",
    )


def pytest_configure(config):
    if config.getoption("--full"):
        hypothesis.settings.load_profile("full")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("full")])
        items[:] = [i for i in items if not i.get_closest_marker("full")]

    oracle_items = [item for item in items if item.get_closest_marker("oracle")]
    if config.getoption("--require-oracles") and not oracle_items:
        raise pytest.UsageError("--require-oracles: no test is marked `oracle`")
    missing = [name for name in ORACLES if importlib.util.find_spec(name) is None]
    if missing:
        for item in oracle_items:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))

    for backend in ("gpu", "tpu"):
        for item in items:
            if item.get_closest_marker(backend) and jax.default_backend() != backend:
                item.add_marker(pytest.mark.skip(reason=f"jax sees no {backend}"))


def _fail_if_oracles_are_required(report, config):
    """Turn a skip into a failure under --require-oracles; an expected failure is no skip."""
    if config.getoption("--require-oracles") and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped under --require-oracles: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.get_closest_marker("oracle"):
        _fail_if_oracles_are_required(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    # A whole module skipped, as by `pytest.importorskip("torch")` at its top.
    report = yield
    return _fail_if_oracles_are_required(report, collector.config)
