"""How to load and run the file, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def snippets(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return how to load and run the file, by platform.

    Args:
        report: The content of ``report.json``.
    """
    inputs = (report.get("model") or {}).get("inputs") or [{}]
    shape = inputs[0].get("shape") or [1]
    floats = 1
    for size in shape:
        floats *= int(size or 1)
    outputs = (report.get("model") or {}).get("outputs") or [{}]
    units = int((outputs[0].get("shape") or [1, 1])[-1] or 1)
    python = (
        "import numpy as np\nfrom ai_edge_litert.interpreter import Interpreter\n\n"
        'interpreter = Interpreter("model.tflite", num_threads=1)\ninterpreter.allocate_tensors()\n'
        "entry, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]\n"
        f"x = np.zeros({list(shape)}, np.float32)  # one sample, scaled as in training\n"
        'interpreter.set_tensor(entry["index"], x)\ninterpreter.invoke()\n'
        'print(interpreter.get_tensor(result["index"]))'
    )
    kotlin = (
        '// build.gradle: implementation("com.google.ai.edge.litert:litert:1.+")\n'
        "import org.tensorflow.lite.Interpreter\nimport org.tensorflow.lite.support.common.FileUtil\n\n"
        'val interpreter = Interpreter(FileUtil.loadMappedFile(context, "model.tflite"))\n'
        f"val input = java.nio.ByteBuffer.allocateDirect({4 * floats}).order(java.nio.ByteOrder.nativeOrder())\n"
        f"val output = Array(1) {{ FloatArray({units}) }}\n"
        "interpreter.run(input, output)"
    )
    swift = (
        "// Podfile: pod 'TensorFlowLiteSwift'\nimport TensorFlowLite\n\n"
        'let path = Bundle.main.path(forResource: "model", ofType: "tflite")!\n'
        "let interpreter = try Interpreter(modelPath: path)\ntry interpreter.allocateTensors()\n"
        f"let input = [Float](repeating: 0, count: {floats})\n"
        "try interpreter.copy(input.withUnsafeBufferPointer(Data.init(buffer:)), toInputAt: 0)\n"
        "try interpreter.invoke()\nlet output = try interpreter.output(at: 0).data"
    )
    cpp = (
        '#include "tensorflow/lite/interpreter_builder.h"\n#include "tensorflow/lite/kernels/register.h"\n'
        '#include "tensorflow/lite/model_builder.h"\n\n'
        'auto model = tflite::FlatBufferModel::BuildFromFile("model.tflite");\n'
        "tflite::ops::builtin::BuiltinOpResolver resolver;\nstd::unique_ptr<tflite::Interpreter> interpreter;\n"
        "tflite::InterpreterBuilder(*model, resolver)(&interpreter);\ninterpreter->AllocateTensors();\n"
        f"float* input = interpreter->typed_input_tensor<float>(0);  // {floats} values\n"
        f"interpreter->Invoke();\nfloat* output = interpreter->typed_output_tensor<float>(0);  // {units} values"
    )
    return [
        {"name": "Python", "code": python}, {"name": "Android (Kotlin)", "code": kotlin},
        {"name": "iOS (Swift)", "code": swift}, {"name": "Linux (C++)", "code": cpp},
    ]  # fmt: skip
