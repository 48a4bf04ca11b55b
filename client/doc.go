// Package client is a CONNECT-IP client (RFC 9484). It connects to a proxy over
// HTTP/3, requests addresses, configures the host with them and with the routes
// that the proxy advertises, moves IP packets, and reconnects when the
// connection is lost. It also forwards UDP through a proxy (RFC 9298).
//
// # Running a client
//
// Fill in a [Config], make a [Client] with [New] and call [Client.Run]. New
// checks the configuration and does nothing else. Run opens the tunnel and
// maintains it until its context is done or a failure is final, and restores
// the host before it returns. A Client runs once. To start again, make another
// one.
//
// Run needs CAP_NET_ADMIN: it opens a TUN device, marks its sockets, and adds
// addresses, routes and firewall rules to the network namespace of the calling
// thread. [CheckProxy] connects, makes the request and disconnects, without
// privileges and without changes to the host.
//
// # Configuration
//
// Only Config.Proxy is required. Most programs also set these fields:
//
//   - Name identifies the tunnel on this host. Two clients that run at the same
//     time need different names.
//   - TLS and Token have the credentials: a client certificate, a bearer token,
//     or both, as the proxy requires.
//   - InstallRoutes configures the routes. Without it, the tunnel has addresses
//     and the program adds routes itself. Accept and Exclude limit the routes.
//   - Reconnect makes the client retry, and Service makes it more patient
//     before the first session.
//   - KillSwitch drops packets that would leave the host outside the tunnel,
//     see routing.KillSwitch. Journal lets the next start clean up after a
//     crash.
//
// # States
//
// [Client.Status] returns the state with the reason for it. The channel of
// [Client.Changed] is closed when the status changes. [HasSession] reports
// whether the state is one in which the tunnel carries packets.
//
//	state         next states
//	connecting    connected, degraded, stopping, failed
//	connected     degraded, reconnecting, stopping, failed
//	degraded      connected, reconnecting, stopping, failed
//	reconnecting  connected, degraded, stopping, failed
//	stopping      failed
//
// A tunnel is connecting until its first session is connected. A session is
// connected when the host has the proxy's configuration and a packet has come
// back through the tunnel. If no packet comes back but the proxy acknowledges
// probes, the session counts as connected, with a warning.
//
// The state is degraded if the tunnel carries packets but does not keep a
// promise, for example because another program opened the kill switch. Status
// lists other problems as warnings.
//
// The state is reconnecting while there is no session after the first, and also
// while the path to the proxy is dead and the client looks for another path. A
// client that changes networks keeps its session: it migrates the connection
// (RFC 9000 section 9) and the state stays connected or changes only for a
// moment.
//
// Stopping is the state when the context of Run is done. After Run has returned
// an error the state is failed.
//
// # Errors
//
// The errors of New, Run and CheckProxy match *[Error] with errors.As. An Error
// is one line that explains the failure and names the remedy. Its [Kind] is for
// programs: the credentials are wrong, the proxy does not answer, and so on.
//
// Without Config.Reconnect the first failure is final, and Run returns it.
// Otherwise the client retries, with exponential backoff up to Config.MaxDelay,
// and earlier if the host's network changes. [Client.Failure] returns the error
// of the last attempt. These failures are final:
//
//   - before the first session: a wrong configuration, a missing privilege, and
//     answers that a retry will not change, such as a certificate from an
//     unknown authority or status 404
//   - before the first session of a Service: a wrong configuration, a missing
//     privilege, and rejected credentials or requests
//   - after a session: rejected credentials or requests
//
// No unauthenticated packet can end a client that has had a session, so nobody
// on the path can remove its routes. docs/failures.md has the complete table.
//
// # Changes to the host
//
// When Run starts, it closes the kill switch, cleans up after a killed client
// with the same Name, and opens the device. When the proxy has assigned
// addresses and advertised routes, Run configures the device, the routes and
// the host's resolver. It restores changes that other programs make to them,
// opens another device if the device is deleted, and applies later changes of
// the proxy.
//
// Between two sessions the host keeps the device, the addresses and the routes:
// packets for the tunnel are dropped and do not leave in the clear.
//
// When Run returns, the host is as before, with one exception: the kill switch
// stays closed, and the program decides when to open it. If the process is
// killed, the kernel removes the device with its addresses and routes. Rules,
// sysctls and the resolver's settings stay until the next Run with the same
// Name and Journal.
//
// The client does not trust the proxy with the host: it refuses addresses and
// ignores routes that belong to networks of this host.
//
// # Use in tests
//
// Config.OpenDevice and Config.OpenNetwork replace the device and the
// configuration of the kernel. With the packages tuntest and routingtest a
// client runs in memory, without privileges, also against a real proxy. The
// example of this package does so.
//
// # Forwarding UDP
//
// A [UDPForwarder] sends the UDP packets of a local port through the proxy to
// one target. It needs no privileges and does not change the host.
package client
