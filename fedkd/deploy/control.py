"""The operator's line to the server's own SuperLink: start a run, ask how it is, stop it. Loopback only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import fedkd.deploy.switches  # noqa: F401  # first: Flower reads its switches when it is imported
from fedkd.deploy.kit import ServerKit
from fedkd.errors import FedkdError

import httpx  # isort: skip
from flwr.common.serde import fab_to_proto, user_config_to_proto  # isort: skip
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest  # isort: skip
from flwr.supercore.control import ControlHttpClient  # isort: skip
from flwr.supercore.fab import Fab  # isort: skip
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor  # isort: skip

SERVER_APP = '''"""Flower's ServerApp of fedkd on a real network. The rounds are the library's own."""

from fedkd.deploy.serve import serve  # first: it sets the switches that Flower reads when it is imported

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the kit's folder of runs says."""
    serve(grid, context)
'''

CLIENT_APP = '''"""Flower's ClientApp of fedkd on a real network, for a stock SuperNode. FEDKD_KIT names this client's kit."""

from fedkd.deploy.stock import answer  # first: it sets the switches that Flower reads when it is imported

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train("respond")
def respond(message: Message, context: Context) -> Message:
    """Let the device work and answer, under its own policy."""
    return answer(message)
'''

PROJECT = """[project]
name = "fedkd-run"
version = "{version}"
description = "A run of fedkd; the apps load the library that is installed."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedkd"
fab-include = ["serverside.py", "clientside.py"]

[tool.flwr.app.components]
serverapp = "serverside:app"
clientapp = "clientside:app"

[tool.flwr.app.config]
run = ""
"""


class ControlError(FedkdError):
    """The server's SuperLink is not there, or refuses."""


@dataclass(frozen=True)
class RunState:
    """A Flower run: its number, and ``status`` as Flower says it: pending, starting, running, finished."""

    id: int
    status: str
    sub_status: str
    details: str

    @property
    def ended(self) -> bool:
        """Whether it will never go on."""
        return self.status == "finished"


class Control:
    """See the module text."""

    def __init__(self, kit: ServerKit) -> None:
        self._address = kit.control_address
        self._client = ControlHttpClient(
            f"https://{kit.control_address}",
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            verify=kit.loopback_tls(),
        )

    def start(self, config: Mapping[str, str]) -> int:
        """Start a run of fedkd's apps; returns Flower's number for it."""
        fab = app_bundle()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(fab).hexdigest(), fab, {})),
            override_config=user_config_to_proto(dict(config)),
        )
        found = self._call(lambda: self._client.StartRun(request))
        if not found.HasField("run_id"):
            raise ControlError(f"SuperLink did not start the run: {found.note or 'it gives no reason'}")
        return int(found.run_id)

    def state(self, run: int) -> RunState | None:
        """Return how a run is; None if SuperLink does not know it."""
        found = self._call(lambda: self._client.ListRuns(ListRunsRequest(run_id=run)))
        one = found.run_dict.get(run)
        if one is None:
            return None
        return RunState(run, one.status.status, one.status.sub_status, one.status.details)

    def stop(self, run: int) -> bool:
        """End a run."""
        return bool(self._call(lambda: self._client.StopRun(StopRunRequest(run_id=run))).success)

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _call(self, call: Any) -> Any:
        try:
            return call()
        except httpx.HTTPStatusError as cause:
            words = " ".join(cause.response.text.split())[:300]
            raise ControlError(
                f"SuperLink at {self._address} answered {cause.response.status_code}: {words}"
            ) from cause
        except httpx.HTTPError as cause:
            raise ControlError(
                f"SuperLink at {self._address} cannot be reached ({cause or type(cause).__name__}): is the server "
                "running? `fedkd server status`"
            ) from cause


def app_bundle() -> bytes:
    """Return fedkd's two apps as Flower takes them: a few lines that load the installed library."""
    from flwr.cli.build import build_fab_from_files

    version = ".".join(metadata.version("fedkd").split(".")[:3])
    files = {
        "pyproject.toml": PROJECT.format(version=version).encode(),
        "serverside.py": SERVER_APP.encode(),
        "clientside.py": CLIENT_APP.encode(),
    }
    bundle: bytes = build_fab_from_files(files)[0]
    return bundle
