"Spending a reward while a diffusion model samples."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['particles', 'schedulers', 'traces', 'previews', 'worlds', 'arguments', 'hook',
                                       'pipelines', 'combine', 'cost'])
