"""Recipes as people write them, of the models ``base``, ``math``, ``code`` and ``chat``; none names its types."""

from __future__ import annotations

from typing import Final

LINEAR: Final = {
    "linear": """
models:
  - model: math
    parameters:
      weight: 0.6
  - model: code
    parameters:
      weight: 0.3
  - model: chat
    parameters:
      weight: 0.25
merge_method: linear
""",
    "linear of weights that are not normalized": """
models:
  - model: math
    parameters: {weight: 0.6}
  - model: code
    parameters: {weight: -0.25}
merge_method: linear
parameters: {normalize: false}
""",
    "linear with filters and gradients": """
models:
  - model: math
    parameters:
      weight:
        - filter: self_attn
          value: [0.1, 0.9, 0.4]
        - filter: embed_tokens
          value: 0.75
        - value: 0.5
  - model: code
    parameters:
      weight: [1.0, 0.0]
  - model: base
    parameters:
      weight: 1e-1
merge_method: linear
base_model: base
parameters:
  normalize:
    - filter: mlp
      value: false
    - value: true
""",
    "linear of slices with layer ranges": """
slices:
  - sources:
      - model: math
        layer_range: [0, 2]
        parameters: {weight: 0.7}
      - model: code
        layer_range: [2, 4]
        parameters: {weight: [0.1, 0.6]}
  - sources:
      - model: chat
        layer_range: [1, 4]
      - model: code
        layer_range: [1, 4]
    parameters: {weight: [0.2, 0.3, 0.9]}
merge_method: linear
parameters: {weight: 0.5}
""",
    "a method's parameter in a module": """
modules:
  default:
    models:
      - model: math
      - model: chat
        parameters: {weight: 0.2}
    parameters: {weight: [0.5, 1.5]}
merge_method: linear
""",
    "task_arithmetic": """
models:
  - model: math
    parameters: {weight: 0.8}
  - model: code
    parameters: {weight: [0.3, 0.7, -0.2]}
  - model: chat
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: base
parameters: {lambda: 0.9}
""",
    "task_arithmetic, normalized, with the base among the models": """
models:
  - model: base
  - model: math
    parameters: {weight: 0.8}
  - model: code
    parameters: {weight: 0.3}
merge_method: task_arithmetic
base_model: base
parameters: {normalize: true, int8_mask: true}
""",
    "nearswap": """
models:
  - model: math
merge_method: nearswap
base_model: base
parameters: {t: [0.0005, 0.002]}
""",
    "ram": """
models:
  - model: math
  - model: code
  - model: chat
merge_method: ram
base_model: base
parameters: {epsilon: 1e-4}
""",
    "ramplus_tl": """
models:
  - model: math
  - model: code
  - model: chat
merge_method: ramplus_tl
base_model: base
parameters: {r: 0.2, alpha: 0.3}
""",
    "dare_ties with nothing dropped": """
models:
  - model: math
    parameters: {weight: 0.5, density: 1.0}
  - model: code
    parameters: {weight: 0.3, density: 1}
merge_method: dare_ties
base_model: base
""",
    "della with nothing dropped": """
models:
  - model: math
    parameters: {weight: 0.5, density: 1.0}
  - model: code
    parameters: {weight: 0.3, density: 1}
merge_method: della_linear
base_model: base
parameters: {epsilon: 0.1}
""",
}  # fmt: skip

TOP_K: Final = {
    "ties": """
models:
  - model: math
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: code
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: chat
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
""",
    "ties, summed and rescaled": """
models:
  - model: math
    parameters: {weight: 0.6, density: 0.25}
  - model: code
    parameters: {weight: 0.5, density: 0.6}
merge_method: ties
base_model: base
parameters: {normalize: false, rescale: true, lambda: 1.1}
""",
    "breadcrumbs": """
models:
  - model: math
    parameters: {weight: 0.6, density: 0.9, gamma: 0.01}
  - model: code
    parameters: {weight: 0.5, density: [0.4, 0.8], gamma: 0.05}
merge_method: breadcrumbs
base_model: base
""",
    "breadcrumbs_ties": """
models:
  - model: math
    parameters: {weight: 0.6}
  - model: code
    parameters: {weight: 0.5}
  - model: chat
    parameters: {weight: 0.4}
merge_method: breadcrumbs_ties
base_model: base
parameters: {density: 0.7, gamma: 0.02, normalize: true}
""",
}

GRAM: Final = {
    "slerp": """
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: chat
        layer_range: [0, 4]
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
""",
    "slerp of layers of its own": """
slices:
  - sources:
      - model: base
        layer_range: [0, 3]
      - model: stranger
        layer_range: [1, 4]
merge_method: slerp
base_model: base
parameters:
  t: [0.1, 0.9]
""",
    "model_stock": """
models:
  - model: math
  - model: code
  - model: chat
merge_method: model_stock
base_model: base
""",
    "model_stock by rows": """
models:
  - model: math
  - model: chat
merge_method: model_stock
base_model: base
parameters: {filter_wise: true}
""",
    "nuslerp": """
models:
  - model: math
    parameters: {weight: [0.2, 0.8]}
  - model: stranger
    parameters: {weight: 0.5}
merge_method: nuslerp
""",
    "nuslerp of task vectors": """
models:
  - model: math
    parameters: {weight: 0.3}
  - model: chat
    parameters: {weight: 0.7}
merge_method: nuslerp
base_model: base
""",
    "nuslerp by rows": """
models:
  - model: math
    parameters: {weight: 0.3}
  - model: stranger
    parameters: {weight: 0.7}
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "nuslerp by columns": """
models:
  - model: math
    parameters: {weight: 0.3}
  - model: chat
    parameters: {weight: 0.7}
merge_method: nuslerp
base_model: base
parameters: {nuslerp_flatten: false, nuslerp_row_wise: false}
""",
    "multislerp": """
models:
  - model: math
    parameters: {weight: 0.3}
  - model: code
    parameters: {weight: 0.3}
  - model: stranger
    parameters: {weight: 0.7}
merge_method: multislerp
""",
    "multislerp of task vectors": """
models:
  - model: math
    parameters: {weight: 0.3}
  - model: chat
    parameters: {weight: 0.7}
merge_method: multislerp
base_model: base
parameters: {normalize_weights: false}
""",
    "karcher": """
models:
  - model: math
  - model: stranger
  - model: chat
merge_method: karcher
parameters: {max_iter: 20, tol: 1e-6}
""",
}

SCE: Final = """
models:
  - model: math
  - model: code
  - model: chat
merge_method: sce
base_model: base
parameters: {select_topk: [0.3, 0.9]}
"""

ARCEE_FUSION: Final = """
models:
  - model: chat
merge_method: arcee_fusion
base_model: base
"""

PASSTHROUGH: Final = {
    "a frankenmerge": """
slices:
  - sources:
      - model: base
        layer_range: [0, 3]
  - sources:
      - model: math
        layer_range: [1, 3]
  - sources:
      - model: chat
        layer_range: [2, 4]
merge_method: passthrough
""",
    "a frankenmerge with scales": """
slices:
  - sources:
      - model: base
        layer_range: [0, 2]
  - sources:
      - model: base
        layer_range: [1, 3]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
  - sources:
      - model: base
        layer_range: [3, 4]
merge_method: passthrough
""",
    "one model scaled": """
models:
  - model: chat
    parameters:
      scale:
        - filter: mlp
          value: [0.5, -1.7]
        - value: 1.0
merge_method: passthrough
""",
}

SEVERAL: Final = """
name: first
models:
  - model: math
    parameters: {weight: 0.6}
  - model: code
    parameters: {weight: 0.5}
merge_method: task_arithmetic
base_model: base
dtype: float32
---
models:
  - model: first
  - model: chat
merge_method: slerp
base_model: first
parameters: {t: 0.3}
dtype: float64
"""
