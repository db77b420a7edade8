"""Where the ranks of all peers run, from the options of `bench peers`."""

import argparse
import socket

import pytest

from hvdkit.bench import jobs
from hvdkit.bench.peers import place
from hvdkit.bench.peers.place import Place
from hvdkit.errors import UsageError


def of(hosts="", ranks=None, cpus=""):
    return place.of(argparse.Namespace(hosts=hosts, ranks=ranks, cpus=cpus))


def test_ranks_are_two_or_the_slots_of_the_hosts():
    assert of() == Place(2)
    assert of(ranks=1) == Place(1)
    assert of("h1:1,h2:2", cpus="0,1,0") == Place(3, "h1:1,h2:2", (0, 1, 0))
    assert of("h1:2,h2:2", ranks=3).host_of_each_rank() == ["h1", "h1", "h2"]
    assert of("h1:1,h2:2").ranks_of_a_host() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": "h1:0"}, "-H h1:0 has the host 'h1:0'"),
        ({"hosts": "h1:1", "ranks": 2}, "-np 2 asks for more ranks than the hosts h1:1 have slots"),
        ({"cpus": "0-2", "hosts": "h1:2"}, "--cpus 0-2 names 3 core(s) for 2 ranks. Name the same number for each"),
        ({"cpus": "a"}, "--cpus a is not understood"),
        ({"cpus": "0,999"}, "--cpus 0,999 names 999, and this host has the cores 0"),
    ],
)
def test_mistakes_get_a_sentence(options, message):
    with pytest.raises(UsageError) as raised:
        of(**options)
    assert message in str(raised.value)


def test_other_hosts_may_have_other_cores():
    other = max(jobs.usable_cores()) + 1
    assert of("h1:1,h2:1", cpus=f"{other},{other}").cpus == (other, other)


def test_each_rank_has_an_address_on_its_host(monkeypatch):
    found = [address.split(":") for address in Place(3, "h1:2,h2:1").addresses()]
    assert [host for host, _ in found] == ["h1", "h1", "h2"]
    assert len({port for _, port in found}) == 3
    with socket.create_server(("", 0)) as taken, socket.create_server(("", 0)) as other:
        ports = [server.getsockname()[1] for server in (taken, other)]
        monkeypatch.setattr(place, "_PORTS", ports)
        other.close()
        for _ in range(20):  # the order is random
            assert Place(1).addresses() == [f"127.0.0.1:{ports[1]}"]
