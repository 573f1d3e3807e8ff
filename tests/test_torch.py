"""PyTorch modules: loaded, compared, trained, pruned, exported. Needs `dwindle[torch]`; skipped without it."""

import numpy as np
import pytest

import dwindle as dw

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
# PyTorch's exporter warns about its own code.
pytestmark = pytest.mark.filterwarnings("ignore")
nn = torch.nn


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        return torch.relu(x + self.body(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.body(self.table(ids))[:, 0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.LSTM(5, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


def convolutional():
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
    return nn.Sequential(stem, Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_a_network_of_images(tmp_path):
    module = convolutional()
    module.train()
    model = dw.load(module, inputs=(1, 3, 16, 16), layout="channels_last")
    assert module.training
    assert model.input_shape == (None, 16, 16, 3)
    assert model.notes[0].startswith("agrees with PyTorch")
    x = np.random.default_rng(0).random((6, 16, 16, 3)).astype(np.float32)
    module.eval()
    with torch.no_grad():
        expected = module(torch.as_tensor(x.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(model(x), expected, atol=1e-5)
    model.compile("adam", "mse")
    model.fit(x, np.zeros((6, 4)), verbose=0)
    slim = dw.prune(model, 0.5, structure="channel")
    assert slim.count_params() < model.count_params()
    assert dw.export(slim, tmp_path / "m.tflite", "int8", x).verification.passed


@pytest.mark.parametrize(
    ("module", "inputs"), [(Attention, torch.randint(0, 50, (2, 7))), (Recurrent, (1, 9, 5))], ids=["attention", "lstm"]
)
def test_sequences(module, inputs, tmp_path):
    model = dw.load(module(), inputs=inputs)
    assert model.notes[0].startswith("agrees with PyTorch")
    assert dw.export(model, tmp_path / "m.tflite").verification.passed


def test_inputs_are_needed():
    with pytest.raises(dw.ConfigError, match="does not know its input shapes; pass inputs="):
        dw.load(convolutional())
    with pytest.raises(dw.ConfigError, match="`inputs` holds a str"):
        dw.load(convolutional(), inputs="image")
    with pytest.raises(dw.DwindleError, match="PyTorch can't export the module `Sequential`"):
        dw.load(convolutional(), inputs=(1, 5, 16, 16))
