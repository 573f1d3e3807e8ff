"""PyTorch modules: loaded, compared, trained, pruned, written in int8. Needs `dwindle[torch]`; skipped without it."""

import keras
import numpy as np
import pytest

import dwindle as dw

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
from torch_zoo import KINDS  # noqa: E402

# PyTorch's exporter warns about its own code.
pytestmark = pytest.mark.filterwarnings("ignore")


def made(name):
    make, inputs = KINDS[name]
    torch.manual_seed(0)
    module = make()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module, inputs


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name, tmp_path):
    module, inputs = made(name)
    model = dw.load(module, inputs=inputs, layout="channels_last")
    rng = np.random.default_rng(0)
    x = [
        rng.random((6, *key.shape[1:])).astype(np.float32) if "float" in key.dtype else rng.integers(0, 100, (6, 16))
        for key in model.inputs
    ]
    module.eval()
    with torch.no_grad():
        turned = [np.moveaxis(a, -1, 1) if a.ndim > 3 or name == "sound" else a for a in x]
        expected = module(*map(torch.as_tensor, turned)).numpy()
    x = x[0] if len(x) == 1 else x
    found = np.asarray(model(x))
    found = np.moveaxis(found, -1, 1) if found.ndim > 3 else found
    np.testing.assert_allclose(found, expected, atol=1e-5)

    model.compile("adam", "mse")
    before = [np.asarray(v) for v in model.trainable_variables]
    model.fit(x, np.zeros(model(x).shape, np.float32), verbose=0)
    moved = [not np.array_equal(a, b) for a, b in zip(before, model.trainable_variables, strict=True)]
    # Biases in front of a softmax over positions, or of a group's mean, have no gradient.
    assert sum(moved) > 0.8 * len(moved)
    slim = dw.prune(model, 0.5, structure="channel")
    assert slim.count_params() < 0.9 * model.count_params()
    assert dw.export(slim, tmp_path / "m.tflite", "int8", x).verification.passed
    slim.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(dw.load(tmp_path / "m.keras")(x), slim(x))


def test_the_module_is_left_as_it_was():
    module, inputs = made("resnet")
    module.train()
    module[2].eval()
    model = dw.load(module, inputs=inputs)
    assert model.input_shape == (None, 3, 32, 32)
    assert model.notes[0].startswith("agrees with PyTorch")
    assert module.training
    assert not module[2].training
    assert sum(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers) == 6


def test_inputs_are_needed():
    module, _ = made("resnet")
    with pytest.raises(dw.ConfigError, match="does not know its input shapes; pass inputs="):
        dw.load(module)
    with pytest.raises(dw.ConfigError, match="`inputs` holds a str"):
        dw.load(module, inputs="image")
    with pytest.raises(dw.DwindleError, match="PyTorch can't export the module `Sequential`"):
        dw.load(module, inputs=(1, 5, 16, 16))


def test_an_exported_program_is_read_once_it_is_trusted(tmp_path):
    module, inputs = made("resnet" if "resnet" in KINDS else next(iter(KINDS)))
    module.eval()
    example = torch.rand(inputs if isinstance(inputs[0], int) else inputs[0])
    lengths = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = torch.export.export(module, (torch.cat([example] * 2),), dynamic_shapes=lengths)
    torch.export.save(program, str(tmp_path / "net.pt2"))
    with pytest.raises(
        dw.UnsupportedModelError, match=r"net\.pt2` is unpickled by PyTorch.*pass trust=True \(--trust\)"
    ):
        dw.load(tmp_path / "net.pt2")
    model = dw.load(tmp_path / "net.pt2", trust=True, layout="channels_last")
    x = np.random.default_rng(0).random((5, *model.inputs[0].shape[1:]), np.float32)
    with torch.no_grad():
        expected = module(torch.as_tensor(np.moveaxis(x, -1, 1))).numpy()
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert model.notes[0].startswith("agrees with PyTorch")
    (tmp_path / "text.pt2").write_text("this is no program")
    with pytest.raises(dw.UnsupportedModelError, match=r"text\.pt2` can't be read as a \.pt2 file"):
        dw.load(tmp_path / "text.pt2", trust=True)
