"""Who can reach whom in the cluster of `--strategy=multiworker`."""

import re

import pytest

from hvdkit import UsageError
from hvdkit.strategies.cluster import Member, check_reachable


def test_hosts_that_can_reach_each_other():
    check_reachable([Member("h1", "10.0.0.1", 4000), Member("h2", "10.0.0.2", 4000), Member("h2", "10.0.0.2", 4001)])


def test_on_one_host_a_loopback_address_will_do():
    check_reachable([Member("h1", "127.0.1.1", 4000), Member("h1", "127.0.1.1", 4001)])


def test_on_several_hosts_a_loopback_address_is_refused():
    members = [Member("h1", "10.0.0.1", 4000), Member("h2", "127.0.1.1", 4000)]
    with pytest.raises(UsageError, match=re.escape("In /etc/hosts of h2, replace 127.0.1.1 by the address")):
        check_reachable(members)
