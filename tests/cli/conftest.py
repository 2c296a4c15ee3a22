from tests.pipeline.conftest import fake_steps as fake_steps
from tests.pipeline.conftest import model as model
from tests.pipeline.conftest import write as write
