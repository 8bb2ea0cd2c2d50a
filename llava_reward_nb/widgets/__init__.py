"Front doors with a mouse and a keyboard, for JupyterLab and what else shows ipywidgets."
from llava_reward_nb import room

__getattr__, __dir__ = room(__name__, ['judge', 'session', 'active', 'stage', 'playground', 'labeller', 'steering_viewer', 'table_explorer'])
