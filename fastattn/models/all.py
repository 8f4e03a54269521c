from .insert import *
from .projection import *
from .xresnet import *
