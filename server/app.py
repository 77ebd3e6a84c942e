"""Flower's ServerApp of fedkd; `flwr run .` loads it. The rounds are the library's own."""

from pathlib import Path

from fedkd.runners.flower import serve  # first: it sets the switches that Flower reads when it is imported

from flwr.app import Context  # isort: skip
from flwr.serverapp import Grid, ServerApp  # isort: skip

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's configuration names."""
    serve(grid, context, home=Path(__file__).resolve().parents[1])
