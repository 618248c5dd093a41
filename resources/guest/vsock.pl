# Runs a command on connections by AF_VSOCK, of which busybox knows nothing:
#   vsock.pl cid
#   vsock.pl connect PORT COMMAND...
#   vsock.pl listen PORT COMMAND...
# It needs perl and none of its modules.
my ($what, $port, @command) = @ARGV;
my ($AF_VSOCK, $SOCK_STREAM, $HOST, $ANY) = (40, 1, 2, 0xffffffff);
my $GET_LOCAL_CID = 0x7b9;

# struct sockaddr_vm
sub address { return pack 'S S L L C x3', $AF_VSOCK, 0, $port, $_[0], 0; }

sub run {
    my $connection = shift;
    open STDIN, '<&', $connection or die "input: $!\n";
    open STDOUT, '>&', $connection or die "output: $!\n";
    close $connection;
    exec @command or die "$command[0]: $!\n";
}

if ($what eq 'cid') {
    my $cid = pack 'L', 0;
    open my $device, '<', '/dev/vsock' or die "/dev/vsock: $!\n";
    ioctl $device, $GET_LOCAL_CID, $cid or die "ioctl: $!\n";
    print unpack('L', $cid), "\n";
    exit;
}
socket my $socket, $AF_VSOCK, $SOCK_STREAM, 0 or die "socket: $!\n";
if ($what eq 'connect') {
    connect $socket, address($HOST) or die "connect: $!\n";
    run($socket);
}
bind $socket, address($ANY) or die "bind: $!\n";
listen $socket, 256 or die "listen: $!\n";
$SIG{CHLD} = 'IGNORE';
while (accept my $connection, $socket) {
    next if fork;
    close $socket;
    run($connection);
}
die "accept: $!\n";
