"""Shapes against published parameter counts, KV sizes from papers, and Hugging Face's own configs."""

import json
import subprocess
import sys

import pytest
import yaml

from kvsim.errors import InputError
from kvsim.model import Model, list_models, load_model
from kvsim.units import GB, GIB

NAMES = [
    "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "mistral-7b-v0.3",
    "qwen2.5-7b", "qwen3-8b", "qwen3-32b", "mpt-7b", "mpt-7b-storywriter", "gpt-j-6b", "cerebras-gpt-6.7b", "opt-6.7b",
    "opt-13b", "opt-30b", "opt-66b", "opt-175b", "bloom-176b",
]  # fmt: skip

SHAPE = {"num_layers": 24, "hidden_size": 2048, "num_q_heads": 16, "intermediate_size": 8192, "vocab_size": 32000,
         "max_context_tokens": 2048}  # fmt: skip


def model(**changes):
    return Model(**{"name": "test", "num_kv_heads": 16, "head_dim": 128, **SHAPE, **changes})


def test_catalogue_is_complete():
    assert set(list_models()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_computed_parameters_match_the_published_count(name):
    loaded = load_model(name)
    assert loaded.num_params == pytest.approx(loaded.published_num_params, rel=0.01)
    assert "Hugging Face" in loaded.source


@pytest.mark.parametrize(
    ("name", "num_params"),
    [("llama-3.1-8b", 8_030_261_248), ("qwen2.5-7b", 7_615_616_512), ("qwen3-8b", 8_190_735_360),
     ("gpt-j-6b", 6_050_882_784), ("mpt-7b", 6_649_286_656), ("bloom-176b", 176_247_271_424)],
)  # fmt: skip
def test_parameters_are_exact(name, num_params):
    assert load_model(name).num_params == num_params


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [("llama-3.1-8b", 131072), ("llama-3.1-70b", 327680), ("mpt-7b", 524288), ("opt-6.7b", 524288),
     ("llama-2-7b", 524288)],
)  # fmt: skip
def test_kv_bytes_per_token(name, kv_bytes):
    assert load_model(name).kv_bytes_per_token() == kv_bytes
    assert load_model(name).kv_bytes_per_token("int4") == kv_bytes / 4


def test_kv_sizes_from_papers():
    assert load_model("llama-3.1-8b").kv_bytes_per_token() * 128_000 / GIB == pytest.approx(15.6, abs=0.05)
    assert model().kv_bytes_per_token() * 32 * 2048 / GB == pytest.approx(12.9, abs=0.05)
    llama_65b = model(num_layers=80, hidden_size=8192, num_q_heads=64, num_kv_heads=64, intermediate_size=22016)
    for loaded, kv_gib in ((load_model("opt-175b"), 1152), (llama_65b, 640), (load_model("bloom-176b"), 980)):
        assert loaded.kv_bytes_per_token("fp16") * 128 * 2048 / GIB == pytest.approx(kv_gib, rel=1e-3)


def test_heads_per_gpu_repeat_kv_heads_beyond_their_number():
    loaded = load_model("qwen2.5-7b")
    assert [loaded.kv_heads_per_gpu(tp) for tp in (1, 2, 4, 7)] == [4, 2, 1, 1]
    assert [loaded.q_heads_per_gpu(tp) for tp in (1, 2, 4, 7)] == [28, 14, 7, 4]


@pytest.mark.parametrize("tp", [0, -1, 9, 16, True, 2.0, "2"])
def test_tp_out_of_range(tp):
    with pytest.raises(InputError, match="must be a whole number from 1 to 8"):
        load_model("llama-3.1-8b").check_tp(tp)


def test_tp_must_divide_the_query_heads():
    with pytest.raises(InputError, match=r"tp=8 must divide the 28 query heads of qwen2.5-7b; use one of 1, 2, 4, 7"):
        load_model("qwen2.5-7b").check_tp(8)


def test_gemms_of_llama_8b():
    loaded = load_model("llama-3.1-8b")
    assert loaded.gemms() == (
        ("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)
    )  # fmt: skip
    assert loaded.gemms(8) == (("qkv", 768, 4096), ("o", 4096, 512), ("gate_up", 3584, 4096), ("down", 4096, 1792))
    assert loaded.lm_head(8) == ("lm_head", 16032, 4096)
    assert load_model("opt-6.7b").gemms()[2] == ("up", 16384, 4096)


@pytest.mark.parametrize("name", NAMES)
def test_weight_bytes(name):
    loaded = load_model(name)
    assert loaded.weight_bytes("bf16") == loaded.weight_bytes("fp16") == 2 * loaded.num_params
    by_size = [loaded.weight_bytes(dtype) for dtype in ("int4", "fp8", "bf16")]
    assert by_size == sorted(by_size) and loaded.weight_bytes("int8") == loaded.weight_bytes("fp8")
    # Split over GPUs nothing is lost; norms, positions, some biases and KV heads are repeated, and no more than that.
    for tp in loaded.valid_tps():
        assert 1 <= loaded.weight_bytes("bf16", tp) * tp / loaded.weight_bytes("bf16") < 1.06


def test_quantised_weights_keep_embeddings_in_16_bits():
    loaded = load_model("llama-3.1-8b")
    linear = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    rest = loaded.num_params - linear
    assert loaded.weight_bytes("int4") == linear * 0.53125 + 2 * rest
    assert loaded.weight_bytes("fp8") == pytest.approx(linear + 2 * rest, rel=1e-3)


LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
         "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "tie_word_embeddings": False}  # fmt: skip
CONFIGS = {
    "llama-3.1-8b": LLAMA,
    "mistral-7b-v0.3": {**LLAMA, "model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768,
                        "sliding_window": None},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
                   "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                   "max_position_embeddings": 131072, "sliding_window": 131072, "use_sliding_window": False},
    "qwen3-32b": {"model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64,
                  "num_hidden_layers": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                  "max_position_embeddings": 40960, "attention_bias": False},
    "mpt-7b-storywriter": {"model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432,
                           "max_seq_len": 65536, "no_bias": True, "expansion_ratio": 4, "learned_pos_emb": True,
                           "attn_config": {"alibi": True, "attn_type": "multihead_attention"}},
    "gpt-j-6b": {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": None,
                 "n_positions": 2048, "rotary_dim": 64, "vocab_size": 50400, "tie_word_embeddings": False},
    "cerebras-gpt-6.7b": {"model_type": "gpt2", "n_embd": 4096, "n_layer": 32, "n_head": 32, "n_inner": 16384,
                          "n_positions": 2048, "vocab_size": 50257},
    "opt-30b": {"model_type": "opt", "hidden_size": 7168, "num_hidden_layers": 48, "num_attention_heads": 56,
                "ffn_dim": 28672, "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 7168},
    "bloom-176b": {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112,
                   "vocab_size": 250880, "seq_length": 2048},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_config_gives_the_catalogue_model(tmp_path, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    from_folder, catalogue = load_model(folder), load_model(name)
    assert from_folder == load_model(str(folder / "config.json"))
    assert from_folder.name == "mine"
    different = {key for key, value in vars(catalogue).items() if vars(from_folder)[key] != value}
    assert different <= {"name", "source", "published_num_params"}


def test_explicit_head_dim_is_honoured(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "head_dim": 64}))
    assert load_model(path).head_dim == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, r"model.model_type='mamba' must be one of llama, mistral, qwen2"),
        ({}, r"model.model_type must be one of"),
        ({**LLAMA, "num_local_experts": 8}, r"model.num_local_experts=8 means a mixture of experts"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, r"model.kv_lora_rank=512 means latent attention"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 4096}, r"model.sliding_window=4096 means sliding-window"),
        ({**LLAMA, "num_hidden_layers": 0}, r"model.num_hidden_layers=0 must be >= 1"),
        ({**LLAMA, "hidden_size": "4096"}, r"model.hidden_size='4096' must be a whole number"),
        ({**LLAMA, "num_key_value_heads": 5}, r"model.num_kv_heads=5 must divide num_q_heads=32"),
        ({"model_type": "llama"}, r"model.hidden_size is missing"),
        ({**CONFIGS["opt-30b"], "word_embed_proj_dim": 512}, r"OPT-350m"),
        ([], r"must hold a JSON object"),
        ("{", r"is not valid JSON"),
    ],
)
def test_bad_config_is_one_clear_line(tmp_path, config, message):
    path = tmp_path / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InputError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)


def test_user_yaml_with_defaults(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SHAPE))
    loaded = load_model(str(path))
    assert (loaded.name, loaded.num_kv_heads, loaded.head_dim, loaded.source) == ("small", 16, 128, "user file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": -1}, r"model.num_layers=-1 must be >= 1"),
        ({"num_layers": float("nan")}, r"model.num_layers=nan must be a whole number"),
        ({"num_layers": None}, r"model.num_layers must not be null"),
        ({"gated_mlp": "yes"}, r"model.gated_mlp='yes' must be true or false"),
        ({"num_layer": 3}, r"model.num_layer is not a known key; did you mean num_layers\?"),
        ({"norm": "batch"}, r"model.norm='batch' must be one of rms, layer"),
        ({"position": "alibi", "num_learned_positions": 5}, r"model.num_learned_positions=5 must be > 0 exactly when"),
    ],
)
def test_bad_user_yaml(tmp_path, change, message):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(SHAPE | change))
    with pytest.raises(InputError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-3-8b", r"model='llama-3-8b' is not in the catalogue; did you mean .*llama-3.1-8b.*`kvsim list models`"),
        ("meta-llama/Llama-3.1-8B", r"did you mean llama-3.1-8b"),
        ("./nope", r"does not exist"),
        ("", r"is not in the catalogue"),
    ],
)
def test_unknown_name_or_missing_file(name, message):
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_python_callers_get_the_same_checks():
    with pytest.raises(InputError, match=r"model.num_layers=0 must be a whole number >= 1"):
        model(num_layers=0)


def test_the_catalogue_imports_nothing_heavy():
    heavy = ("torch", "scipy", "matplotlib", "numpy")
    code = f"import sys, kvsim.model, kvsim.hardware; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
