"Rewards with one face: `reward(images, prompts)`."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['clip', 'imagereward', 'vqa', 'grader', 'llava', 'registry', 'combine', 'ocr', 'real', 'cards'])
