from .insert import *
from .xresnet import *
