package client

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/time/rate"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/endpoint"
	"masquevpn/internal/flowqueue"
	"masquevpn/internal/rescue"
	"masquevpn/routing"
	"masquevpn/tun"
)

const (
	// minMTU and maxMTU bound the MTU of the device, in bytes. IPv6 needs 1280
	// (RFC 8200 section 5).
	minMTU = 1280
	maxMTU = flowqueue.MaxSize

	// sendBatch limits the packets taken from the queue at once. It is small
	// because the queue cannot reorder packets that have left it.
	sendBatch = 16
)

// Client maintains one tunnel. New creates it, and Run does the work. The other
// methods may be called concurrently, before, during and after Run.
type Client struct {
	// Set by New and constant afterwards.
	cfg      Config
	target   target
	instance string // identifies this run to the proxy
	host     *host

	// dialer dials for the goroutine of Run. Between dials it opens sockets for
	// the migrator.
	dialer *dialer

	// Synchronised by themselves.
	supervisor   endpoint.Supervisor[*localEndpoint]
	queue        *flowqueue.Queue // packets read from the device
	earlyRetries *rate.Limiter    // limits retries before the backoff ends
	stats        connectip.Stats
	reading      connectip.Busy // the device's reader handles packets
	sender       connectip.Busy // sendQueued handles packets

	// activeConn sends the packets of the device. It is nil while there is no
	// configured session.
	activeConn atomic.Pointer[connectip.Conn]

	// networks are the host's networks without the tunnel's, nil until read.
	networks atomic.Pointer[[]routing.HostNetwork]

	// The fields up to mu are used by the goroutine of Run alone.

	lastDial  dialState                  // the host at the last dial
	lastAddrs []netip.Prefix             // previous session's addresses, requested again
	lastDNS   []capsule.DNSConfiguration // previous session's DNS configuration
	installed []netip.Prefix             // assigned addresses that the kernel has

	// skipRequest makes the next session wait for unprompted addresses, because
	// the proxy ends the tunnel at an ADDRESS_REQUEST.
	skipRequest bool

	// everApplied is set once the kernel has had a proxy's configuration.
	everApplied bool

	// loggedOverlap is the last text of the overlap notice, empty for none.
	loggedOverlap string

	mu sync.Mutex // guards the fields below, up to notingMu

	delegated  []netip.Prefix // prefixes that were assigned, the newest ones
	status     connectip.Status
	reconnects [numLosses]uint64 // status.Reconnects, split by reason
	changed    chan struct{}     // closed and replaced by notify

	// notices are the current notices by key. loopTimer removes the notice of
	// noteLoop, and is nil before the first.
	notices   map[string]notice
	loopTimer *time.Timer

	// failure is the error of the last attempt, nil while connected.
	failure *Error

	// connectedReason is the reason of the last StateConnected. It is shown
	// again when no notice degrades the tunnel any more.
	connectedReason string

	// currentSession and quicConn are nil without a session.
	currentSession *session
	quicConn       *quic.Conn

	// lastState is the last state applied to this or an earlier endpoint. It is
	// nil before the first.
	lastState *routing.State

	assigned []assigned     // addresses that the proxy assigned
	present  []netip.Prefix // addresses that the interface has
	ipv6Held bool           // Health.IPv6Held of the last report

	// repairs (by kind), killSwitchRepairs and dnsRepairs count the changes by
	// other programs that were undone.
	repairs           map[string]uint64
	killSwitchRepairs uint64
	dnsRepairs        uint64
	dnsLost           bool // the resolver has lost the tunnel's settings

	// notingMu serialises the notices about the host's routes and nameservers.
	// It guards loggedOutside and is locked before mu.
	notingMu      sync.Mutex
	loggedOutside string // last logged text about DNS outside the tunnel
}

// Status describes a tunnel. Its JSON form is the output of
// `masque-client status --json`.
type Status = connectip.Status

// The states of a tunnel. The package documentation explains the transitions.
const (
	StateConnecting = "connecting" // no session yet
	StateConnected  = "connected"

	// StateDegraded means connected, but the host does not keep a promise of
	// the tunnel, for example an open kill switch.
	StateDegraded = "degraded"

	StateReconnecting = "reconnecting" // no session, or a dead path, after one
	StateStopping     = "stopping"
	StateFailed       = "failed" // Run has returned an error
)

// The values of Status.KillSwitch.
const (
	KillSwitchOff    = "off"    // not configured
	KillSwitchClosed = "closed" // packets leave through the tunnel only
	KillSwitchOpen   = "open"   // another program has opened it
)

// New checks cfg and returns a Client for it. It opens nothing and sends
// nothing. Its errors are of type *Error and of KindUsage.
func New(cfg Config) (*Client, error) {
	to, err := cfg.resolveTarget()
	if err != nil {
		return nil, err
	}
	withKernel := cfg.OpenNetwork == nil
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	var control controlFunc
	if withKernel {
		control = routing.MarkSocket(cfg.Mark)
	}
	c := &Client{cfg: cfg, target: to, instance: cmp.Or(cfg.Instance, rand.Text()),
		queue: flowqueue.New(), changed: make(chan struct{}), notices: make(map[string]notice)}
	c.supervisor.Open, c.supervisor.Report, c.supervisor.Logger = c.openEndpoint, c.noteHealth,
		cfg.Logger
	c.host = newHost(cfg.Suspended)
	c.earlyRetries = rate.NewLimiter(rate.Every(earlyRetryInterval), earlyRetryBurst)
	c.dialer = newDialer(to, cfg.TLS, cfg.Token, control, cfg.Logger)
	c.dialer.dial.Congestion, c.dialer.upstream = cfg.Congestion, c.upstream
	c.dialer.trusted, c.dialer.nameservers = cfg.Discovery.Nameservers, cfg.Nameservers
	c.dialer.resolver = c.dialer.newResolver(cfg.resolverConfig())
	c.dialer.found = c.noteDiscovery
	c.dialer.dial.Tracer = cfg.Tracer
	c.dialer.dial.Dropped = func(packets int) {
		c.stats.Receive.DropMany(connectip.DropSocketFull, packets)
	}
	c.status = connectip.Status{
		Schema: connectip.StatusSchema, Name: cfg.Name, State: StateConnecting, Since: time.Now(),
		Proxy:     connectip.ProxyStatus{Name: to.host, HTTP: "h3"},
		Addresses: []netip.Prefix{}, Routes: []connectip.RouteStatus{}, KillSwitch: KillSwitchOff,
	}
	c.status.SetDNS(nil, nil)
	return c, nil
}

// Run opens the tunnel and maintains it until ctx is done, and then returns
// nil. A failure that retrying cannot mend ends it earlier: the error then
// matches *Error. Run restores the host before it returns, except that a kill
// switch stays closed. It may be called once.
func (c *Client) Run(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			c.setState(StateFailed, err.Error())
		}
	}()
	if err := c.closeKillSwitch(""); err != nil {
		return err
	}
	if err := c.supervisor.Start(); err != nil {
		c.queue.Close()
		return hostError(err, "")
	}
	c.setState(StateConnecting, "")
	var sending, maintaining sync.WaitGroup
	// A joined error is no *Error itself, so err is joined only if restoring
	// the host failed.
	defer func() {
		if closeErr := c.supervisor.Close(); closeErr != nil {
			err = errors.Join(err, closeErr)
		}
		c.queue.Close()
		sending.Wait()
	}()
	ctx, stop := context.WithCancel(ctx)
	defer maintaining.Wait()
	defer stop()
	endWatch, err := c.watchHost(ctx)
	if err != nil {
		return hostError(err, "")
	}
	defer endWatch()
	sending.Go(c.sendQueued)
	maintaining.Go(func() { c.supervisor.Run(ctx) })
	maintaining.Go(func() { c.maintainDNS(ctx) })
	if c.cfg.KillSwitch != nil {
		maintaining.Go(func() { c.maintainKillSwitch(ctx) })
	}
	err = c.runSessions(ctx)
	c.setState(StateStopping, "")
	return err
}

// closeKillSwitch closes the kill switch, if there is one, except for iface
// ("": no exception). It also restores a closed kill switch.
func (c *Client) closeKillSwitch(iface string) error {
	if c.cfg.KillSwitch == nil {
		return nil
	}
	if err := c.cfg.KillSwitch.Close(iface); err != nil {
		return hostError(err, "closing the kill switch: ")
	}
	c.mu.Lock()
	c.status.KillSwitch = KillSwitchClosed
	c.mu.Unlock()
	return nil
}

// hostError returns an Error for a failed change to this host. The text of err
// follows prefix.
func hostError(err error, prefix string) error {
	c := causeFailure
	if errors.Is(err, tun.ErrPermission) || errors.Is(err, os.ErrPermission) {
		c = causePrivileges
	}
	return fail(c, err, prefix+err.Error(), "")
}

// runSessions runs one session after the other until ctx is done or a failure
// is final.
func (c *Client) runSessions(ctx context.Context) error {
	r := retry{enabled: c.cfg.Reconnect, service: c.cfg.Service, maxDelay: c.cfg.MaxDelay,
		logger: c.cfg.Logger}
	r.everApplied = func() bool { return c.everApplied }
	r.beforeWait = func(everConnected bool, e *Error) {
		c.mu.Lock()
		c.failure = e
		c.mu.Unlock()
		c.noteImpostor(e)
		state := StateConnecting
		if everConnected {
			state = StateReconnecting
			c.mu.Lock()
			c.status.Reconnects++
			c.reconnects[lossOf(e)]++
			c.mu.Unlock()
		}
		c.setState(state, statusText(e))
	}
	r.awaitReason = c.awaitNetworkChange
	return r.run(ctx, func(ctx context.Context) (connected time.Duration, err error) {
		defer rescue.Catch(func(e *rescue.Error) {
			c.logPanic(e)
			err = e
		})
		return c.runSession(ctx)
	})
}

// logPanic logs a panic in a goroutine of a session. The caller ends that
// session.
func (c *Client) logPanic(e *rescue.Error) {
	c.cfg.Logger.Error("a fault of this program ended the session; please report it with this line",
		"panic", fmt.Sprint(e.Value), "stack", string(e.Stack))
}

// noteImpostor updates the warning about a peer that answers in the proxy's
// place. A failure of the authenticated proxy removes it.
func (c *Client) noteImpostor(e *Error) {
	if text := impostorText(e); text != "" || failures[attemptOf(e).cause].source == byProxy {
		c.warn(noticePeer, text)
	}
}

// dispatch sends packets of the device. It sends a single packet at once if the
// tunnel is idle, and then the caller still owns it. It passes queued packets
// to the queue, which owns them, and sets their elements to nil.
func (c *Client) dispatch(packets []*flowqueue.Packet) {
	c.reading.Begin()
	defer c.reading.End()
	if c.dropLoops(packets) {
		return
	}
	switch conn := c.activeConn.Load(); {
	case conn == nil:
		c.stats.Send.DropMany(connectip.DropClosed, len(packets))
	case len(packets) == 1 && c.queue.Idle() && conn.Ready():
		conn.TrySend(packets[0].Bytes(), tun.Headroom) // faster than waking sendQueued
	default:
		c.stats.Send.DropMany(connectip.DropQueueFull, c.queue.Push(packets))
		clear(packets)
	}
}

// sendQueued sends the packets of the queue until the queue is closed.
func (c *Client) sendQueued() {
	var batch [sendBatch]*flowqueue.Packet
	for {
		n, late := c.queue.Pop(batch[:])
		c.stats.Send.DropMany(connectip.DropQueueDelay, late)
		if n == 0 {
			return
		}
		conn := c.activeConn.Load()
		c.sender.Begin()
		for _, p := range batch[:n] {
			if conn == nil {
				c.stats.Send.Drop(connectip.DropClosed)
			} else {
				conn.Send(p.Bytes(), tun.Headroom)
			}
			p.Free()
		}
		c.sender.End()
	}
}

// Changed returns a channel that is closed when the status changes next.
// Counters and the round-trip time change without it. To miss no change, call
// Changed before Status.
func (c *Client) Changed() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

func (c *Client) setState(state, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setStateLocked(state, reason)
	c.notify()
}

// setReason replaces the reason and leaves the state unchanged.
func (c *Client) setReason(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.Reason == reason {
		return
	}
	c.status.Reason = reason
	c.notify()
}

// Failure returns the error of the last failed attempt to connect or of the
// last session that ended. It returns nil before the first failure and while
// the tunnel is connected.
func (c *Client) Failure() *Error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failure
}

// setStateLocked is setState without notify. It turns StateConnected into
// StateDegraded while a notice degrades the tunnel. c.mu is held.
func (c *Client) setStateLocked(state, reason string) {
	if state == StateConnected {
		c.failure, c.connectedReason = nil, reason
		if why := c.degradation(); why != "" {
			state, reason = StateDegraded, why
		}
	}
	if c.status.State != state {
		c.status.Since = time.Now()
	}
	c.status.State, c.status.Reason = state, reason
}

// notify closes the channel that Changed returned. c.mu is held.
func (c *Client) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// Status returns the current status of the tunnel.
func (c *Client) Status() Status {
	c.countOverflow()
	oldest := c.oldest()
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.status
	if c.quicConn != nil {
		s.RTT = c.quicConn.ConnectionStats().SmoothedRTT.Microseconds()
	}
	s.SetTraffic(&c.stats)
	s.OldestPacket = oldest.Milliseconds()
	return s
}
