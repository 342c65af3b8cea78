"""The bundle: the one thing that the author side and the device side share.

A bundle is a folder of plain files: ``manifest.json``, ``template.onnx`` (run once per template),
``segment_0.onnx … segment_n.onnx``, and optionally ``weights.safetensors`` (trainable weights;
only the author side reads them). A family may add two kinds of graphs:

- ``head_0.onnx … head_n.onnx``, one per exit, where the decision to stop needs less than the box:
  only the head of the exit that was taken runs ("decide, then decode").
- ``update.onnx``, for state that lives from frame to frame: it runs once per frame, after the
  target's box was settled and before the next frame, on a template crop cut there.

Tensor names are one flat name space: a graph reads the tensor that another graph wrote under
the same name in the same frame, or that the template graph wrote. The template graph reads
``template`` and ``template_bbox_cxcywh``; segment 0 reads ``search_region``; every segment writes
its answer, ``bbox_cxcywh``, ``score`` and ``uncertainty``, over the answer of the segment before
it. With heads, segments write ``score`` and ``uncertainty``, and heads write ``bbox_cxcywh``.

The update graph reads ``template`` and ``template_bbox_cxcywh`` too: the target as it is in this
frame. What it writes becomes what the next frame reads as ``carried`` says; the first values are
the template graph's. On a frame whose box or score is not finite nothing is carried, so that a
network that failed once cannot spoil the state; whether a target that is lost or unsure is to be
remembered is the family's own matter: the graph reads ``score``.
"""

from edgetrack.bundle.folder import sha256_of, whole_folder
from edgetrack.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    RESEARCH_LICENCE,
    WEIGHTS_NAME,
    Bundle,
    default_bundle_path,
)
from edgetrack.bundle.specs import ANSWER_NAMES, CropSpec, GraphSpec, TensorSpec

__all__ = [
    "ANSWER_NAMES",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "RESEARCH_LICENCE",
    "WEIGHTS_NAME",
    "Bundle",
    "CropSpec",
    "GraphSpec",
    "TensorSpec",
    "default_bundle_path",
    "sha256_of",
    "whole_folder",
]
