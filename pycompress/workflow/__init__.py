"""A whole compression: the stages of a recipe on a real model, evaluated, recorded and saved one by one."""

from pycompress.workflow.errors import CompressError, PreflightError
from pycompress.workflow.records import StageRecord
from pycompress.workflow.result import CompressResult
from pycompress.workflow.run import compress

__all__ = ["CompressError", "CompressResult", "PreflightError", "StageRecord", "compress"]
