// Package lab makes hosts out of network namespaces, connects them, runs
// programs in them and captures their packets.
//
// A program that uses the package calls [Enter] before anything else. Enter
// runs the program again in namespaces of its own, so that nothing the lab
// makes outlives the program, however it ends, and nothing the lab does can be
// seen on the machine. It needs root, or a kernel that lets ordinary users make
// user namespaces.
//
//	func TestMain(m *testing.M) {
//		lab.Enter()
//		os.Exit(m.Run())
//	}
//
//	func TestPing(t *testing.T) {
//		l, err := lab.New(t.Context())
//		...
//		defer l.Close()
//		a, err := l.Host("a")
//		b, err := l.Host("b")
//		err = l.Connect(
//			lab.End{Host: a, Name: "eth0", Addrs: lab.Prefixes("192.0.2.1/24")},
//			lab.End{Host: b, Name: "eth0", Addrs: lab.Prefixes("192.0.2.2/24")},
//			lab.LinkOptions{})
//		rtt, err := a.Ping(t.Context(), netip.MustParseAddr("192.0.2.2"))
//	}
//
// [NewTopology] builds the network that the demonstration and the end-to-end
// tests share.
package lab
