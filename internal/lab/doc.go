// Package lab makes hosts out of network namespaces, connects them, runs
// programs in them and captures their packets. The end-to-end tests, the
// benchmarks and the program masque-lab use it.
//
// # Entering the namespaces
//
// A program that uses the package calls [Enter] before anything else. Enter
// runs the program again in namespaces of its own. All that the lab makes stays
// in them: the machine does not see it, and it disappears with the program,
// even if the program is killed. Enter needs root, or a kernel that lets
// ordinary users make user namespaces.
//
//	func TestMain(m *testing.M) {
//		lab.Enter()
//		os.Exit(m.Run())
//	}
//
// # Hosts and links
//
// [New] makes an empty lab, and [Lab.Host] adds a host. A host is a network
// namespace with its own /etc, /run and /var/lib; it shares all other files
// with the machine. [Lab.Connect] connects two hosts by a veth pair and
// [Lab.Bridge] several by a bridge. Both return when the addresses are usable.
// [Host.AddRoute], [Host.Forward], [Host.Sysctl] and [Host.Resolve] configure a
// host further.
//
// [Lab.Wire] connects two hosts by a link that passes through this process. It
// delays, drops, duplicates, reorders and limits packets as its [Impairment]
// describes, and [Wire.Set] changes the impairment at any time. The random
// decisions repeat with the same seed. Wires are slower than veth pairs, so use
// them only for impairment. They do not need netem.
//
// [NewTopology] makes the network of the demonstration and the end-to-end
// tests: clients, a router, a proxy, and a target behind the proxy.
//
// # Programs and sockets
//
// [Host.Command] describes a program to run in a host, like exec.Command. Its
// output goes to a log that [Cmd.Log] returns. [Host.Listen],
// [Host.ListenPacket] and [Host.DialContext] open sockets of this process in
// the network of a host, so a test needs no helper programs. [Host.Do] calls
// any function in a host, on a thread of its own. Goroutines that the function
// starts run outside the host; sockets and files that it opens stay inside.
//
// # Observing
//
// [Host.Ping], [Host.Probe] and [Host.Traceroute] send echo requests and return
// the answers, including ICMP errors. [Host.Capture] collects the packets of an
// interface and also writes them to a pcap file. [Host.Snapshot] describes the
// network configuration of a host as text, and [Diff] compares two snapshots: a
// program has restored its host if the difference is empty.
//
// For debugging, [Host.NameNamespaces] lets `ip netns exec` in one host enter
// all other hosts by their names.
//
// Logs and captures are artifacts. They are in memory and disappear with the
// lab, unless [WithArtifacts] names a directory for them.
//
// # Cleaning up
//
// [Lab.Close] kills the programs in the lab, ends its captures and wires, and
// removes its hosts. A test closes its lab in a cleanup function and checks the
// error.
package lab
