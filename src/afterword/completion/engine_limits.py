"""Refuses jobs that the model's engine cannot compute exactly, by the name of the field. Pure."""

from __future__ import annotations

import msgspec

from afterword.engine.protocol import Job, JobLimits, ModelInfo
from afterword.errors import RequestError


def check_job(job: Job, model_info: ModelInfo) -> None:
    """Raise `RequestError` for a job that the engine cannot compute exactly.

    A field that an engine does not know yet is refused too, so a new field never has no effect.
    """
    limits = model_info.job_limits
    if limits is None:
        return
    for value in (job, job.sampling):
        for field in msgspec.structs.fields(type(value)):
            if field.name not in limits.fields and not field.required and getattr(value, field.name) != field.default:
                raise RequestError(
                    f"'{field.name}' is not supported by the engine that runs this model. Leave it out.",
                    param=field.name,
                )
    _check_temperature(job.sampling.temperature, limits)


def _check_temperature(temperature: float, limits: JobLimits) -> None:
    if temperature and not limits.min_temperature <= temperature <= limits.max_temperature:
        raise RequestError(
            f"'temperature' must be 0 or from {limits.min_temperature:g} to {limits.max_temperature:g}: the engine "
            f"that runs this model cannot sample with {temperature:g}.",
            param="temperature",
        )
