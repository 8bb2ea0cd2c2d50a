"Recipes of trainings, and what they will cost."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['plan', 'files'])
