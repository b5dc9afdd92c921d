"""The transformations that lead from the reference graphs to the deployed ones, by name.

Owns: their names, their order and a line on each. Must not import anything: cost tables, tests and
documentation read it. Each takes away work whose result is constant for a robot or an instruction,
or that is done twice, and none of them changes what is computed beyond float rounding (the image
chain: one grey level, rarely two, where an engine fuses product and sum). Each has an equivalence
test against the model before it.
"""

from __future__ import annotations

BACKBONE: dict[str, str] = {
    "fixed_shapes": "one observation of one size, one length of prompt, all cameras in one batch",
    "image_chain": "from the cameras' uint8 frames: resizes and crop have constant tables",
    "prompt_prefix": "keys and values of the instruction's prefix come in from the prompt bank",
    "constant_embeddings": "no token is looked up: the live text is a constant, no table is kept",
    "fused_vision_qkv": "query, key and value of a vision layer are one product",
    "fused_language_projections": "query, key and value are one product, gate and up another",
}

HEAD: dict[str, str] = {
    "embodiment_slice": "one embodiment's slice of each category-specific layer is kept",
    "unrolled_loop": "all denoising steps stand in one graph: one launch, tokens stay inside",
    "constant_time": "time codes, AdaLN scales and shifts of every step are constants",
    "attended_tokens": "text blocks read the text tokens alone, image blocks the image tokens",
    "hoisted_cross_kv": "keys and values once an observation, one product for each kind of token",
    "prefix_text_kv": "keys and values of the instruction's prefix come in from the prompt bank",
    "committed_rows": "rows that the robot is already executing can be handed in",
    "fused_self_qkv": "query, key and value of a self-attention are one product",
    "folded_action_encoder": "two linear layers of the action encoder and its time code are one",
    "folded_action_decoder": "two linear layers of the output are one, for action tokens alone",
}
