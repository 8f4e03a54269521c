from .data import *
from .train import *
