"`python -m llava_reward_nb COMMAND …` is `llava_reward COMMAND …`; `accelerate launch -m llava_reward_nb COMMAND …` starts it several times."
from llava_reward_nb.commands.main import llava_reward

if __name__ == '__main__': llava_reward()
