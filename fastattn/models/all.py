from .insert import *
from .nonlinear import *
from .positional import *
from .projection import *
from .timm import *
from .xresnet import *
