"""A config.json as a model: parameters as published, layers with windows, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from configs import PUBLISHED, llama

from porter.errors import ModelError
from porter.estimate import Model
from porter.estimate.config import read


def of(tmp_path: Path, config: object) -> Model:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), "utf-8")
    return read(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str, tmp_path: Path) -> None:
    config, parameters = PUBLISHED[name]
    assert of(tmp_path, config).parameters == parameters


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("Llama-3-8B", {0: 32}),
        ("Mistral-7B", {4096: 32}),
        ("Qwen2-7B", {0: 28}),
        ("gemma-2-9b", {4096: 21, 0: 21}),
        ("gemma-3-1b", {512: 22, 0: 4}),
    ],
)
def test_layers_that_see_a_window(name: str, windows: dict[int, int], tmp_path: Path) -> None:
    model = of(tmp_path, PUBLISHED[name][0])
    assert {a.window: a.count for a in model.attention} == windows


def test_layer_types_say_which_slide(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    config = llama(64, 3, 4, 2, 128, 100, model_type="qwen3", sliding_window=16, layer_types=types)
    assert {a.window: a.count for a in of(tmp_path, config).attention} == {16: 2, 0: 1}


def test_a_text_config_inside_another_is_read(tmp_path: Path) -> None:
    config = PUBLISHED["gemma-3-1b"][0]
    outer = {"model_type": "gemma3", "vision_config": {}, "text_config": config}
    assert of(tmp_path, outer).parameters == of(tmp_path, config).parameters


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"hidden_size": 0}, "PORT-0330"),
        ({"hidden_size": "64"}, "PORT-0330"),
        ({"num_hidden_layers": True}, "PORT-0330"),
        ({"vocab_size": None}, "PORT-0330"),
        ({"intermediate_size": None}, "PORT-0330"),
        ({"num_key_value_heads": -1}, "PORT-0330"),
        ({"model_type": "t5"}, "PORT-0331"),
        ({"model_type": None}, "PORT-0331"),
        ({"kv_lora_rank": 512}, "PORT-0331"),
    ],
)
def test_what_is_no_decoder_is_refused(change: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        of(tmp_path, llama(64, 3, 4, 2, 128, 100) | change)
    assert error.value.code == code


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_what_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ModelError) as error:
        read(path)
    assert error.value.code == "PORT-0330"
