"The offline world of coloured shapes, and the truth about it."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['world', 'prompts', 'scenes', 'edits', 'records', 'checker'])
