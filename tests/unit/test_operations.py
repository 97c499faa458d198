"""Operations of a model: those that are published."""

import pytest

from clipval.throughput.operations import flops_per_sample


@pytest.mark.parametrize(("tower", "flops"), [("vision", 8.82e9), ("text", 5.96e9)])
def test_flops_are_the_published_ones(tower, flops):
    config = {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "width": 512, "heads": 8, "layers": 12},
    }
    assert flops_per_sample(config, tower) == pytest.approx(flops, rel=2e-3)


def test_other_architectures_have_no_count():
    plain = {"layers": 12, "width": 768, "image_size": 224, "patch_size": 32}
    config = {"embed_dim": 512, "vision_cfg": {"layers": [3, 4, 6, 3]}, "text_cfg": {"hf_model_name": "x"}}
    for vision in ({**plain, "image_size": [224, 336]}, {"timm_model_name": "x", "layers": 12}):
        assert flops_per_sample({**config, "vision_cfg": vision}, "vision") is None
    assert flops_per_sample({**config, "vision_cfg": plain, "multimodal_cfg": {}}, "vision") is None
    assert flops_per_sample(config, "vision") is None
    assert flops_per_sample(config, "text") is None
