from .lm_eval import SteeredLM as SteeredLM
