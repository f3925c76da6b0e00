"""Names of version 0.1 inside of modules: each still works, with a warning that says the new name."""

import importlib

import pytest
import torch

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.pipelines import resume_qat, setup_qat
from halfeven.ptq.data_free.moment_propagation import InputDistribution
from halfeven.ptq.recipe import PTQRecipe
from halfeven.ptq.recipe import decide as decide_ptq
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct
from halfeven.ptq.transformers.reparametrization import reparametrize
from halfeven.qat.batchnorm_schedule import freeze_batchnorms
from halfeven.qat.bit_schedule import BitSchedule
from halfeven.qat.ema import WeightEMA
from halfeven.qat.recipe import QATRecipe, decide
from halfeven.qat.session import QATSession
from halfeven.quantization.model_quantizers import quantizers
from halfeven.renamed import renamed_attributes, renamed_parameters
from halfeven.tasks.torchvision_detection import TorchvisionDetection

OLD_ATTRIBUTES = {
    "halfeven.ptq.data_free.moment_propagation.Inputs": InputDistribution,
    "halfeven.ptq.recipe.Recipe": PTQRecipe,
    "halfeven.ptq.recipe.choose": decide_ptq,
    "halfeven.ptq.transformers.smoothing.reparametrize": reparametrize,
    "halfeven.pipelines.accompany": setup_qat,
    "halfeven.pipelines.course_of": resume_qat,
    "halfeven.qat.batchnorm_schedule.re_estimate": re_estimate,
    "halfeven.qat.batchnorm_schedule.freeze": freeze_batchnorms,
    "halfeven.qat.bit_schedule.Progression": BitSchedule,
    "halfeven.qat.ema.WeightAverage": WeightEMA,
    "halfeven.qat.recipe.Recipe": QATRecipe,
    "halfeven.qat.recipe.choose": decide,
    "halfeven.qat.session.Course": QATSession,
    "halfeven.quantization.quantizer.quantizers": quantizers,
    "halfeven.tasks.detection.TorchvisionDetection": TorchvisionDetection,
}


@renamed_parameters(say="log", state="resume_dir")
def greet(name: str, *, log: str = "", resume_dir: str = "") -> tuple[str, str, str]:
    return name, log, resume_dir


def test_an_old_parameter_is_passed_on_with_a_warning_where_it_is_used():
    with pytest.warns(DeprecationWarning, match=r"say= of greet\(\) is log= now") as seen:
        assert greet("x", say="a") == ("x", "a", "")
    assert seen[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"resume_dir= now"):
        assert greet("x", log="a", state="b") == ("x", "a", "b")


def test_new_parameters_give_no_warning(recwarn):
    assert greet("x", log="a", resume_dir="b") == ("x", "a", "b")
    assert not recwarn


def test_old_and_new_at_once_are_refused():
    with pytest.warns(DeprecationWarning, match="say="), pytest.raises(TypeError, match="by its old name"):
        greet("x", say="a", state="b", resume_dir="c")
    with pytest.raises(TypeError, match="unexpected"):
        greet("x", speak="a")


@pytest.mark.parametrize("function", [he.quantize, setup_qat, adaround, reconstruct])
def test_public_functions_take_say_and_state(function):
    with pytest.warns(DeprecationWarning, match="say="), pytest.raises(TypeError, match=r"missing|twice"):
        function(say=print, state=None, resume_dir=None)


def test_quantize_says_what_is_wrong_with_its_own_message():
    with pytest.warns(DeprecationWarning, match="say="), pytest.raises(ConfigError, match="example"):
        he.quantize(torch.nn.Linear(1, 1), say=print)


@pytest.mark.parametrize("old", OLD_ATTRIBUTES)
def test_old_functions_and_classes_are_found(old):
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{old} is halfeven") as seen:
        assert getattr(importlib.import_module(module), name) is OLD_ATTRIBUTES[old]
    assert seen[0].filename == __file__


def test_an_attribute_that_never_was_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        renamed_attributes("module", old="errors.ConfigError")("other")
