"How the embedded models were made, and what was learned from them."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['mllm', 'diffusion', 'metrics', 'guidance', 'table9', 'studies', 'ablations', 'sight', 'gallery', 'cycles'])
