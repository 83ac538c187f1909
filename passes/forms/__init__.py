"""What an adapter computes: parameter shapes, the nodes it becomes, its ΔW."""

from passes.forms.base import AdapterForm, NodeEmitter
from passes.forms.svd import SvdForm

__all__ = ["AdapterForm", "NodeEmitter", "SvdForm"]
