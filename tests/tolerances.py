"""The one table of tolerances: how far numbers may be from what they are compared with.

A test takes its tolerance from here. It is never loosened for one test: what exceeds it is looked
into.
"""

# Largest absolute difference of two backends at one graph and the same inputs, by the dtype that
# the graph computes in.
BETWEEN_BACKENDS = {
    "float32": {"bbox_cxcywh": 1e-4, "score": 1e-4, "uncertainty": 1e-4, "tokens": 1e-3},
}

# Largest absolute difference of a function and a slow twin of it, or a closed form.
FROM_TWIN = {"float32": 1e-5, "float64": 1e-12}

# Largest difference of two loops that run the same engines, one with OpenCV's crops and one with
# the crop kernel, whose pixels differ by a grey level at most.
BETWEEN_LOOPS = {"bbox_px": 0.5}

# Mean difference of two closed loops over one clip: FP16 or FP32 products and the crop kernel on a
# GPU, and FP32 with OpenCV's crops on a CPU.
BETWEEN_DEVICES = {"mean_bbox_px": 2.0}
