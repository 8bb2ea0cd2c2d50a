"The commands of the terminal."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['terminal', 'items', 'score', 'train', 'demo', 'evaluate', 'steer', 'paper', 'serve', 'app', 'main'])
