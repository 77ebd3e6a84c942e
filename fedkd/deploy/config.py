"""The section ``deployment:`` of an experiment: how the server waits for devices on a real network."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DeploymentConfig(BaseModel):
    """None of it is used in a simulation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deadline_seconds: float = Field(3600.0, gt=0, description="A round ends after this, whoever has not answered.")
    quorum: float = Field(
        1.0, gt=0, le=1, description="Share of the devices asked whose answers end a round before its deadline."
    )
    offline_seconds: float = Field(
        300.0, ge=0, description="A device that is offline for so long in a round is not waited for any more."
    )
    wait_seconds: float = Field(
        600.0, ge=0, description="Time for the first population.minimum devices to come online before a run gives up."
    )
    probe_seconds: float = Field(
        10.0, gt=0, description="A device that is silent for so long is asked whether it knows the request."
    )
    max_failed_rounds: int = Field(3, ge=1, description="Rounds that may fail in a row before the run stops.")
    max_answer_mib: float = Field(1024.0, gt=0, description="Longest answer of one device, MiB.")
