"""Makes SuperLink know exactly the clients of clients.yaml. A process of its own, because Flower is large to import."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedkd.deploy.kit import ServerKit
from fedkd.errors import FedkdError

NODES = "nodes.json"


def enrol(kit: ServerKit) -> dict[str, int]:
    """Register new clients, unregister revoked ones, and write ``state/nodes.json``.

    Returns:
        Flower's node id by client name.
    Raises:
        FedkdError: SuperLink refuses, or cannot be reached.
    """
    import httpx
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
    from flwr.supercore.control import ControlHttpClient

    from fedkd.storage import write_json

    authority = kit.path("ca.crt").read_bytes()
    clients = kit.client_list().clients
    try:
        with ControlHttpClient.from_server_address(kit.control_address, False, authority, ()) as control:
            known = {
                node.public_key: node.node_id
                for node in control.ListNodes(ListNodesRequest()).nodes_info
                if not node.HasField("unregistered_at")
            }
            wanted = {client.node_key_pem: client.name for client in clients if not client.revoked}
            for key, id in known.items():
                if key not in wanted:
                    control.UnregisterNode(UnregisterNodeRequest(node_id=id))
            ids = {}
            for key, name in wanted.items():
                if key not in known:
                    known[key] = control.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
                ids[name] = known[key]
    except (httpx.HTTPError, ValueError) as cause:
        raise FedkdError(f"SuperLink at {kit.control_address} did not take the list of clients: {cause}") from cause
    write_json(kit.state / NODES, ids)
    return ids


def main() -> None:
    """Enrol the clients of the kit named on the command line."""
    try:
        print(json.dumps(enrol(ServerKit.read(Path(sys.argv[1])))))
    except FedkdError as cause:
        sys.exit(f"error: {cause}")


if __name__ == "__main__":
    main()
