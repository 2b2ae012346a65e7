"""The command line. Its modules import torch and models only inside the commands."""
