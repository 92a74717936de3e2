"""Which agents upload: what they say of themselves, and when they are through, in any order."""

from dataclasses import replace

import pytest

from raynium.run.protocol import AgentInfo
from raynium.run.uploads import ENDS_KEPT, Uploads

pytestmark = pytest.mark.quick

AGENT = AgentInfo("a", 0, 1, "127.0.0.1", 29500, pid=1)
UPLOADS = replace(AGENT, uploading=("g1", "g2"))


def test_an_agent_uploads_until_all_of_it_is_over_whatever_it_says_late() -> None:
    uploads = Uploads()
    uploads.hears(AGENT)
    assert not uploads.agents()
    uploads.hears(UPLOADS)
    uploads.ended(AGENT.agent_id, ["g1"])
    assert uploads.agents() == [UPLOADS]
    uploads.ended("another", ["g2"])
    assert uploads.agents() == [UPLOADS]
    uploads.ended(AGENT.agent_id, ["g1", "g2"])
    assert not uploads.agents()
    uploads.hears(UPLOADS)
    assert not uploads.agents(), "as it was when its generation began"
    later = replace(AGENT, uploading=("g3",))
    uploads.hears(later)
    assert uploads.agents() == [later]


def test_an_end_that_is_heard_first_counts_and_old_ones_are_forgotten() -> None:
    uploads = Uploads()
    uploads.ended(AGENT.agent_id, ["g1", "g2"])
    uploads.hears(UPLOADS)
    assert not uploads.agents()
    uploads.ended(AGENT.agent_id, [f"g{number}" for number in range(3, 3 + ENDS_KEPT)])
    uploads.hears(UPLOADS)
    assert uploads.agents() == [UPLOADS]
