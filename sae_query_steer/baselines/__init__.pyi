from .dictionaries import control_dictionaries as control_dictionaries
from .residual import residual_mean_difference as residual_mean_difference
from .residual import residual_means as residual_means
from .rows import class_latents as class_latents
from .rows import decoder_rows as decoder_rows
from .simple import few_shot_prompt as few_shot_prompt
from .simple import mean_difference as mean_difference
from .simple import random_direction as random_direction
