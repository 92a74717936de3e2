"""Notices of EC2's that an instance goes, from a metadata service that is played on loopback."""

import threading
from collections.abc import Mapping

import pytest
from metadata import metadata_service
from waiting import wait_for

from raynium.health.notices import Notice, NoticeWatch, ask_for_notices

pytestmark = pytest.mark.quick

# As EC2's guide shows them (Spot instance interruption notices, rebalance recommendations, scheduled events).
PAGES = {
    "/latest/meta-data/spot/instance-action": '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}',
    "/latest/meta-data/events/recommendations/rebalance": '{"noticeTime": "2020-10-27T08:22:00Z"}',
    "/latest/meta-data/events/maintenance/scheduled": """[
        {"NotBefore": "21 Jan 2019 09:00:43 GMT", "Code": "system-reboot", "Description": "scheduled reboot",
         "EventId": "instance-event-0d59937288b749b32", "NotAfter": "21 Jan 2019 09:17:23 GMT", "State": "active"},
        {"NotBefore": "20 Jan 2019 09:00:43 GMT", "Code": "system-reboot", "State": "canceled"}]""",
}
SPOT = Notice("EC2 will terminate this spot instance", 1505722920.0)
REBOOT = Notice("EC2 has scheduled system-reboot for this instance", 1548061243.0)
LEAVE = Notice("EC2 recommends to leave this spot instance", None)


def test_the_three_kinds_are_read_with_their_times_and_cancelled_ones_are_none() -> None:
    with metadata_service(pages=PAGES) as address:
        assert ask_for_notices(address) == [SPOT, REBOOT, LEAVE]
    assert str(SPOT) == "EC2 will terminate this spot instance at 2017-09-18 08:22:00 UTC"
    assert str(LEAVE) == "EC2 recommends to leave this spot instance"


def test_an_instance_that_stays_has_none_and_outside_of_ec2_nobody_is_asked_again() -> None:
    with metadata_service(pages={}) as address:
        assert ask_for_notices(address) == []
    assert ask_for_notices(address) is None
    asked: list[None] = []
    watch = NoticeWatch(lambda: asked.append(None), lambda notice: None, poll_seconds=0.001)
    watch._thread.join(10)
    assert len(asked) == 1
    watch.close()


def test_each_notice_is_told_once_and_one_that_cannot_be_read_ends_nothing() -> None:
    pages: dict[str, str] = {}
    told: list[Notice] = []
    asked = threading.Semaphore(0)

    def ask(address: str, pages: Mapping[str, str]) -> list[Notice] | None:
        asked.release()
        return ask_for_notices(address)

    with metadata_service(pages=pages) as address:
        watch = NoticeWatch(lambda: ask(address, pages), told.append, poll_seconds=0.01)
        asked.acquire()
        pages["/latest/meta-data/spot/instance-action"] = "tomorrow"
        for _ in range(3):
            asked.acquire()
        assert told == []
        pages |= PAGES
        wait_for(lambda: len(told) == 3)
        for _ in range(3):
            asked.acquire()
        watch.close()
    assert told == [SPOT, REBOOT, LEAVE]
