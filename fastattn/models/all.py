from .insert import *
from .positional import *
from .projection import *
from .xresnet import *
