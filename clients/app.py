"""Flower's ClientApp of fedkd; `flwr run .` loads it. The procedure of a device is the library's own."""

from fedkd.runners.flower import answer, run_folder  # first: it sets the switches that Flower reads when imported

from flwr.app import Context, Message  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip

app = ClientApp()


@app.train("respond")
def respond(message: Message, context: Context) -> Message:
    """Let a block of devices work and answer."""
    return answer(message, run_folder(context))
