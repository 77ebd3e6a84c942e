"""Reading inner layers of a model: forward hooks by module path, gone when one is done."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkd.errors import ConfigError


class Taps:
    """Keeps what the modules at ``paths`` of ``model`` gave in the last forward pass.

    A context manager: the hooks are removed at its end, whatever happens, and the model is as it was. (A hook that is
    left behind would leak fake tensors into ``torch.export``.)

    ```python
    with Taps(model, ["layer2"]) as taps:
        logits = model(x)
        features = taps["layer2"]
    ```

    Raises:
        ConfigError: a path leads to no module; the nearest ones are named.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        known = dict(model.named_modules())
        for path in self.paths:
            if path not in known or path == "":
                raise ConfigError(unknown_path(path, [name for name in known if name]))
        self._modules = {path: known[path] for path in self.paths}
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Tensor] = {}

    def __enter__(self) -> Taps:
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def __getitem__(self, path: str) -> Tensor:
        """Return what the module at ``path`` gave last.

        Raises:
            ConfigError: it was not called since the taps were opened.
        """
        if path not in self._seen:
            raise ConfigError(f"layer {path!r} is not called in a forward pass of the model: tap one that is")
        return self._seen[path]

    def all(self) -> dict[str, Tensor]:
        """Return every tapped tensor by path.

        Raises:
            ConfigError: a module was not called since the taps were opened.
        """
        return {path: self[path] for path in self.paths}

    def _hook(self, path: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(f"layer {path!r} gives a {type(output).__name__}: tap a layer that gives one tensor")
            self._seen[path] = output

        return keep


def unknown_path(path: str, known: Sequence[str]) -> str:
    """Return the sentence that tells which module paths lie near a wrong one."""
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.4) or list(known[:8])
    return f"the model has no layer {path!r}; near it: {', '.join(near)}"
