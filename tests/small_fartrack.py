"""FARTracks that are small enough to test with."""

import torch
from small_models import randomise_norms
from torch import Tensor, nn

from edgetrack.models.fartrack import FARTrack, FARTrackConfig
from edgetrack.models.segmented import State

# The paper's kind of network, with all that is off by default.
FARTRACK_PATCH = FARTrackConfig(
    template_size_px=64,
    search_size_px=96,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(2, 3, 4),
    num_templates=4,
    selection_layers=2,
    history_places=4,
    num_bins=40,
    num_trajectory=2,
    min_update_score=0.05,
    drop_path=0.0,
)
# The kind of ``micro``.
FARTRACK_PRIOR = FARTrackConfig(
    template_size_px=64,
    search_size_px=96,
    stem="shuffle",
    correlation_dim=16,
    dim=32,
    num_heads=2,
    mlp_ratio=2.0,
    exit_after=(1, 3),
    num_templates=3,
    selection_layers=1,
    history_places=4,
    num_bins=40,
    drop_path=0.0,
)


def make_fartrack(config: FARTrackConfig, *, seed: int = 0) -> FARTrack:
    """A model in eval mode that tells tokens, slots and words apart."""
    torch.manual_seed(seed)
    model = FARTrack(config).eval()
    randomise_norms(model)
    nn.init.normal_(model.identity, std=0.5)
    nn.init.normal_(model.vocabulary.word_embeddings, std=0.5)
    nn.init.normal_(model.vocabulary.position_embeddings, std=0.5)
    nn.init.normal_(model.vocabulary.output_bias, std=0.5)
    return model


@torch.no_grad()
def follow(model: FARTrack, template: Tensor, bbox: Tensor, search_regions: list[Tensor]) -> State:
    """State after some frames, each graph on nothing but what it says it reads.

    Every frame's template is the first, darker by the frame's number.
    """
    state = model.embed_template(template, bbox)
    for number, search_region in enumerate(search_regions, 1):
        state["search_region"] = search_region
        for index in range(model.num_exits):
            state |= model.run_segment(index, {n: state[n] for n in model.segment_inputs(index)})
        state |= {"template": template // (number + 1), "template_bbox_cxcywh": bbox}
        written = model.run_update({n: state[n] for n in model.update_inputs})
        assert written.keys() == set(model.carried.values())
        state |= {name: written[source] for name, source in model.carried.items()}
    return state
