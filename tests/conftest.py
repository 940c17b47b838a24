"""The tests' small world: tiny random Qwen-VL models of three generations, each with a real transformers processor over a
byte-level BPE trained on the spot, and the stock way to score a response, against which papo.py is held."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import papo

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "big" in item.keywords and "big" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="only with -m big"))


def pytest_collection_finish(session):
    """Make the embedded world's warm start, if it is not in the cache, on another core while the first tests run."""
    if any("warm_start" in getattr(item, "fixturenames", ()) for item in session.items):
        code = "import torch, toy; torch.set_num_threads(1); toy.warm_start()"
        session.config.warming = subprocess.Popen(
            [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL
        )


@pytest.fixture(scope="session")
def warm_start(request):
    """(model, processor) of the embedded world, from the cache."""
    import toy

    request.config.warming.wait()
    return toy.warm_start()


SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ["<image>What is shown here?", "Look at this: <image> How many dots do you see in it?"]
ARCHITECTURES = {  # name: model, processor, video processor, patch size
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", "Qwen2VL", 14),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2_5_VL", "Qwen2VL", 14),
    "qwen3_vl": ("Qwen3VL", "Qwen3VL", "Qwen3VL", 16),
}


def make_tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [q.replace("<image>", "") + papo.PROMPT_SUFFIX for q in QUESTIONS] + ["user\n", "assistant\n"]
    bpe.train_from_iterator(
        corpus * 9,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=SPECIAL_TOKENS,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:],
        clean_up_tokenization_spaces=False,
    )


def make_processor(architecture):
    _, processor, video, patch = ARCHITECTURES[architecture]
    unit = (2 * patch) ** 2  # pixels of one merged token
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, merge_size=2, size={"shortest_edge": 6 * unit, "longest_edge": 20 * unit}
    )
    videos = getattr(transformers, f"{video}VideoProcessor")(patch_size=patch, merge_size=2)
    return getattr(transformers, f"{processor}Processor")(
        images, make_tokenizer(), videos, chat_template=CHAT_TEMPLATE
    )


def make_model(architecture, processor, vision_sizes=(), **text):
    """fp32, weights of standard deviation 0.2: outputs far from uniform, and the picture matters (see test_scoring)."""
    name, _, _, patch = ARCHITECTURES[architecture]
    ids = dict(zip(SPECIAL_TOKENS, processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    text = {
        **dict(
            vocab_size=len(processor.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=processor.tokenizer.eos_token_id,
        ),
        **text,
    }
    head = 16 if architecture == "qwen3_vl" else text["hidden_size"] // text["num_attention_heads"]
    axis = (
        head // 6
    )  # of the head's rotary pairs, so many are for height, as many for width, the rest for time
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 100.0,
        "mrope_section": [head // 2 - 2 * axis, axis, axis],
    }
    vision = dict(depth=2, num_heads=2, patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    if architecture == "qwen2_vl":
        vision |= dict(embed_dim=32, hidden_size=text["hidden_size"], mlp_ratio=2)
    else:
        vision |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=text["hidden_size"])
    vision |= dict(vision_sizes)
    if architecture == "qwen2_5_vl":
        vision |= dict(window_size=56, fullatt_block_indexes=[1])
    if architecture == "qwen3_vl":
        vision |= dict(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        text |= dict(head_dim=head)
    tied = architecture == "qwen2_5_vl"
    config = getattr(transformers, f"{name}Config")(
        text_config={**text, "tie_word_embeddings": tied},
        vision_config=vision,
        tie_word_embeddings=tied,
        dtype="float32",
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        shift = 0.2 * torch.randn(parameter.shape, generator=generator)
        norm = parameter.dim() == 1 and parameter.min() == 1  # its weight stays around 1
        parameter.data = parameter.data + shift if norm else shift
    model.get_output_embeddings().weight.data *= 2
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    return model.eval()


def picture(seed, width=90, height=60, mode="RGB"):
    """Coloured noise without a single black pixel."""
    pixels = np.random.default_rng(seed).integers(30, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def _built(request):
    processor = make_processor(request.param)
    return make_model(request.param, processor), processor


@pytest.fixture(scope="session")
def _built_one():
    processor = make_processor("qwen2_5_vl")
    return make_model("qwen2_5_vl", processor), processor


def _lend(model, processor):
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    config = model.generation_config
    yield model, processor
    model.load_state_dict(weights)
    model.gradient_checkpointing_disable()
    model.set_attn_implementation("sdpa")
    model.generation_config = config
    model.model.rope_deltas = None
    model.requires_grad_(True)
    model.zero_grad()
    model.eval()


@pytest.fixture
def vlm(_built):
    """(model, processor), once for each architecture, put back in order after each test."""
    yield from _lend(*_built)


@pytest.fixture
def one_vlm(_built_one):
    """(model, processor) of one architecture, Qwen2.5-VL: for what does not depend on it."""
    yield from _lend(*_built_one)


def two_prompts(processor):
    """Two prompts of different lengths, with images of 2x3 and 4x3 merged tokens, so that the three M-RoPE axes differ."""
    unit = 2 * processor.image_processor.patch_size
    return [
        papo.encode_prompt(processor, QUESTIONS[0], picture(1, 3 * unit, 2 * unit)),
        papo.encode_prompt(processor, QUESTIONS[1], picture(2, 3 * unit + 5, 4 * unit - 3)),
    ]


def random_responses(processor, lengths, seed=0):
    """Responses of random ordinary tokens, each with the end-of-sequence token at its end."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(len(SPECIAL_TOKENS), len(processor.tokenizer), (n,), generator=generator)
    return [torch.cat([draw(n - 1), torch.tensor([processor.tokenizer.eos_token_id])]) for n in lengths]


def shift_logits(model, shifts):
    """Add shifts {token id: number} to all logits from now on. Returns the hook's handle."""

    def hook(module, inputs, logits):
        logits = logits.clone()
        for token, shift in shifts.items():
            logits[..., token] += shift
        return logits

    return model.get_output_embeddings().register_forward_hook(hook)


def stock_logits(model, prompt, response):
    """One response after its prompt through the model's own forward, full logits: (|o|, V), row t predicts token t."""
    prompt_ids = prompt["input_ids"]
    ids = torch.cat([prompt_ids, response[None]], dim=1)
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
    )
    return out.logits[0, prompt_ids.shape[1] - 1 : -1]


def stock_score(model, prompt, response, temperature=1.0):
    """-> log-probs (|o|,), entropies (|o|,)"""
    distribution = torch.distributions.Categorical(logits=stock_logits(model, prompt, response) / temperature)
    return distribution.log_prob(response), distribution.entropy()
