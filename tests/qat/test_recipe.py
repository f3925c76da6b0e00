"""Which steps accompany a training, by the bits and by what the options say."""

import pytest
import torch

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.options import QATOptions
from halfeven.qat.recipe import decide
from placement.parts import IMAGE, Residual

AT_LOW_BITS = ("average", "re_estimate", "ranges")


def recipe(scheme, re_estimate="auto", batchnorm="keep", freeze="auto", per_channel=True, **options):
    torch.manual_seed(0)
    qmodel = he.prepare(Residual(), torch.randn(IMAGE), scheme=scheme, batchnorm=batchnorm, per_channel=per_channel)
    return decide(
        qmodel, QATOptions(**options), ScheduleOptions(re_estimate=re_estimate, freeze_batchnorm_after=freeze)
    )


def taken(found):
    return {name for name in vars(found) if name != "blocks" and getattr(found, name).enabled}


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("w8a8", set()),
        ("w6a8", {"re_estimate"}),
        ("w4a8", set(AT_LOW_BITS)),
        ("w8a4", set(AT_LOW_BITS)),
        ("w3a4", {"reconstruct", *AT_LOW_BITS}),
    ],
)
def test_the_bits_decide(scheme, expected):
    assert taken(recipe(scheme)) == expected


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("distill", "distill"),
        ("average", "average"),
        ("freeze_oscillations", "freeze"),
        ("dampen_oscillations", "dampen"),
        ("progress", "progress"),
    ],
)
def test_every_step_can_be_switched(option, name):
    assert name in taken(recipe("w8a8", **{option: "on"}))
    assert name not in taken(recipe("w4a4", **{option: "off"}))


@pytest.mark.parametrize(
    ("options", "enabled", "reason"),
    [
        (dict(scheme="w4a8"), True, "at 4 bits the loss finds better scales"),
        (dict(scheme="w8a8"), False, "at 8 bits ranges that follow the data train as well"),
        (dict(scheme="w4a8", ranges="observed"), False, "as the options say"),
        (dict(scheme="w8a8", ranges="lsq"), True, "as the options say"),
    ],
)
def test_it_says_why_ranges_are_learned(options, enabled, reason):
    qmodel = he.prepare(Residual(), torch.randn(IMAGE), **options)
    found = decide(qmodel, QATOptions(), ScheduleOptions())
    assert found.ranges.enabled is enabled
    assert reason in str(found)


@pytest.mark.parametrize(
    ("scheme", "option", "step", "in_vain"),
    [
        ("w8a4", "freeze_oscillations", "freeze", True),
        ("w8a4", "dampen_oscillations", "dampen", True),
        ("w4a8", "dampen_oscillations", "dampen", False),
        ("w8a8", "progress", "progress", True),
        ("w8a4", "progress", "progress", False),
    ],
)
def test_it_says_where_a_step_changes_nothing(scheme, option, step, in_vain):
    assert ("in vain" in getattr(recipe(scheme, **{option: "on"}), step).reason) is in_vain


def test_the_start_can_be_chosen():
    assert not recipe("w4a4", start="ranges").reconstruct.enabled
    assert recipe("w8a8", start="layers").reconstruct.enabled
    assert not recipe("w8a8", start="layers").blocks
    assert recipe("w8a8", start="blocks").blocks


def test_channels_are_equalized_where_one_scale_serves_them_and_batchnorm_is_folded():
    assert recipe("w8a8", batchnorm="fold", per_channel=False).equalize.enabled
    assert not recipe("w8a8", batchnorm="fold", per_channel=False, equalize="off").equalize.enabled
    assert not recipe("w8a8", batchnorm="fold").equalize.enabled
    assert recipe("w8a8", batchnorm="fold", equalize="on").equalize.enabled
    for batchnorm in ("keep", "fold live"):
        assert not recipe("w8a8", batchnorm=batchnorm, per_channel=False).equalize.enabled
        with pytest.raises(ConfigError, match="would undo it"):
            recipe("w8a8", batchnorm=batchnorm, equalize="on")


def test_a_progression_starts_from_ranges():
    found = recipe("w3a4", progress="on")
    assert not found.reconstruct.enabled
    assert "means nothing for the first" in str(found)
    assert not recipe("w3a4", progress="on", start="ranges").reconstruct.enabled
    assert recipe("w3a4", progress="off", start="blocks").reconstruct.enabled


@pytest.mark.parametrize("start", ["layers", "blocks"])
def test_a_start_that_a_progression_would_ignore_is_refused(start):
    with pytest.raises(ConfigError, match=f'qat.start="{start}" would have no effect'):
        QATOptions(progress="on", start=start)


def test_batchnorm_is_re_estimated_as_asked_and_never_where_it_is_folded():
    assert recipe("w8a8", re_estimate=True).re_estimate.enabled
    assert not recipe("w4a4", re_estimate=False).re_estimate.enabled
    assert not recipe("w4a4", batchnorm="fold").re_estimate.enabled
    assert not recipe("w4a4", freeze=0.5).re_estimate.enabled
    assert recipe("w4a4", re_estimate=True, freeze=0.5).re_estimate.enabled


def test_it_prints_every_step_with_its_reason():
    lines = str(recipe("w4a4")).splitlines()
    assert lines[0] == "Steps of quantization-aware training:"
    assert len(lines) == 10
    assert all(len(line.split("  ")) > 2 for line in lines[1:])
