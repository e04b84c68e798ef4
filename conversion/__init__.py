"""Turn a dense checkpoint into a sparse one, shard by shard; installed and imported as ``hf_sparse.conversion``."""

if __name__ != "hf_sparse.conversion":
    raise ImportError(f"this folder is not the package {__name__!r}: install hf-sparse and import hf_sparse.conversion")

from hf_sparse.conversion.convert import convert
from hf_sparse.conversion.export import ExportReport, export
from hf_sparse.conversion.fidelity import inspect_fidelity
from hf_sparse.conversion.fidelity_report import FidelityReport
from hf_sparse.conversion.layer_plan import LayerPlan
from hf_sparse.conversion.reading import plan_layers
from hf_sparse.conversion.report import ConversionReport, Count

__all__ = [
    "ConversionReport",
    "Count",
    "ExportReport",
    "FidelityReport",
    "LayerPlan",
    "convert",
    "export",
    "inspect_fidelity",
    "plan_layers",
]
