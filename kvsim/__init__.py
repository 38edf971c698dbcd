"""kvsim: what a KV-cache compression policy will do on your GPU, model and traffic, before deployment.

    >>> import kvsim
    >>> scenario = kvsim.load_scenario("scenarios/a100_llama8b.yaml")
    >>> result = kvsim.simulate(scenario)
    >>> result.policies["full"].summary.ttft.p99_s
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsim.api import simulate
    from kvsim.errors import DoesNotFitError, InputError, KvsimError
    from kvsim.result import Result
    from kvsim.scenario import Scenario, load_scenario
    from kvsim.sweeping.run import read_sweep, sweep

    __version__: str

__all__ = [
    "DoesNotFitError", "InputError", "KvsimError", "Result", "Scenario", "__version__", "load_scenario", "read_sweep",
    "simulate", "sweep",
]  # fmt: skip

_HOMES = {
    "simulate": "kvsim.api",
    "DoesNotFitError": "kvsim.errors", "InputError": "kvsim.errors", "KvsimError": "kvsim.errors",
    "Result": "kvsim.result",
    "Scenario": "kvsim.scenario", "load_scenario": "kvsim.scenario",
    "read_sweep": "kvsim.sweeping.run", "sweep": "kvsim.sweeping.run",
}  # fmt: skip
"""Where each public name lives; imported when it is first asked for, so that `import kvsim` and `kvsim --help` stay light."""


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("kvsim")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'kvsim' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
